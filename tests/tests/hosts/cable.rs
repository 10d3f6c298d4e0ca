//! The cable between two hosts, at its worse.
//!
//! It is cut, and loses packets, in the hosts' own packet filters: what arrives is thrown away. Delay is a detour through
//! `cable.py`, because not every kernel that this runs on has netem.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stillebot_tests::wait::PATIENCE;
use stillebot_tests::{Host, wait_until};

/// How much of what a cable carries is lost.
#[derive(Clone, Copy)]
pub enum Cable {
    Whole,
    /// One packet in twenty, each way.
    Poor,
    Cut,
}

/// Makes the cable like this.
pub fn set(hosts: &[Host; 2], cable: Cable) -> Result<()> {
    let lost = match cable {
        Cable::Whole => "true",
        Cable::Poor => "nft add rule inet cable end iifname != lo numgen random mod 100 '<' 5 counter drop",
        Cable::Cut => "nft add rule inet cable end iifname != lo counter drop",
    };
    for host in hosts {
        host.run(&format!(
            "nft flush ruleset; nft add table inet cable
             nft add chain inet cable end '{{ type filter hook input priority 0; }}'; {lost}"
        ))?;
    }
    Ok(())
}

/// How many packets have been lost on the way to a host since the cable was last set.
pub fn lost(host: &Host) -> Result<u64> {
    let rules = host.run("nft list chain inet cable end")?;
    let count = rules.split_once("counter packets ").and_then(|(_, rest)| rest.split(' ').next());
    count.and_then(|count| count.parse().ok()).with_context(|| format!("no count: {rules}"))
}

/// Another way for all packets between two hosts, on which each takes so long.
pub struct Detour([Child; 2]);

impl Detour {
    /// Sends everything that way, and sees that it takes as long as it should.
    pub async fn lay(hosts: &[Host; 2], addresses: [&str; 2], delay: Duration) -> Result<Self> {
        let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/cable.py");
        let ends = [0, 1].map(|end| hosts[end].path("/tmp/cable"));
        let start = |own: usize| -> Result<Child> {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "SIGKILL", "nsenter"]);
            command.arg(format!("--net={}", hosts[own].network()?.display())).arg("python3").arg(&program);
            command.arg(&ends[own]).arg(&ends[1 - own]).arg(delay.as_secs_f64().to_string());
            command.stdin(Stdio::null()).spawn().context("python3")
        };
        let detour = Self([start(0)?, start(1)?]);
        for (own, host) in hosts.iter().enumerate() {
            wait_until("the end of a detour", PATIENCE, || async {
                Ok(host.run("ip link set slow0 up").is_ok().then_some(()))
            })
            .await?;
            host.run(&format!("ip route add {}/32 dev slow0 src {}", addresses[1 - own], addresses[own]))?;
        }
        // A connection takes one packet each way before anything is known of it.
        let began = Instant::now();
        hosts[0].run(&format!(
            "openssl s_client -starttls postgres -connect {}:5432 </dev/null >/dev/null 2>&1 || true",
            addresses[1]
        ))?;
        ensure!(began.elapsed() >= 2 * delay, "packets are not late: {:?}", began.elapsed());
        Ok(detour)
    }

    /// Back to the cable.
    pub fn remove(self, hosts: &[Host; 2]) -> Result<()> {
        for host in hosts {
            host.run("ip link delete slow0")?;
        }
        Ok(())
    }
}

impl Drop for Detour {
    fn drop(&mut self) {
        for end in &mut self.0 {
            let _ = end.kill();
            let _ = end.wait();
        }
    }
}
