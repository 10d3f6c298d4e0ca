//! What befalls a pair of whole hosts, one thing after the other, while both are written and both have their agent running:
//! the cable, a clock, a renewed certificate, packets that are late or lost, a loss of power, a hop that is cut off at every step.
//! After each: nothing is lost, both databases are the same, and status has nothing to say.

use std::fs;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::{sys::signal, unistd::Pid};
use stillebot_agent::hop::STEPS;
use stillebot_tests::wait::PATIENCE;
use stillebot_tests::{Authority, Host, wait_until};

use crate::cable::{self, Cable, set};
use crate::pair::{ADDRESSES, CLUSTER, agent, furnish, hosts};
use crate::{check_log, start_cluster};

/// Starts `watch` as the package's unit would: its command line, as its user. The sandbox of the unit takes a systemd.
fn serve(host: &Host) -> Result<Child> {
    Ok(host
        .command(
            "unit=/usr/lib/systemd/system/stillebot-agent.service
             user=$(sed -n 's/^User=//p' $unit)
             exec setpriv --reuid=$user --regid=$user --clear-groups $(sed -n 's/^ExecStart=//p' $unit) >/dev/null 2>/var/log/agent",
        )?
        .spawn()?)
}

/// Writes a row after the other on its own host, whenever that takes writes, and notes each that was acknowledged. Rests while
/// there is a file `pause`, and says so by a copy of it.
fn write(host: &Host, first: u32) -> Result<Child> {
    let name = host.name();
    Ok(host
        .command(&format!(
            "cd /tmp; id={first}
             while ! test -e stop; do
               if cp pause paused 2>/dev/null; then sleep 0.1
               elif setpriv --reuid=postgres --regid=postgres --clear-groups psql -XAtqd stillebot -c \
                 \"insert into config values ($id, '{name}') on conflict do nothing\" 2>/dev/null
               then echo $id >>acknowledged; id=$((id + 1)); sleep 0.05
               else sleep 0.2; fi
             done"
        ))?
        .stdout(Stdio::null())
        .spawn()?)
}

fn acknowledged(host: &Host) -> Result<Vec<String>> {
    let path = host.path("/tmp/acknowledged");
    let text = if path.exists() { fs::read_to_string(path)? } else { String::new() };
    Ok(text.lines().map(str::to_owned).collect())
}

async fn wait_written(host: &Host) -> Result<()> {
    let goal = acknowledged(host)?.len() + 5;
    let written = wait_until(&format!("writes on {}", host.name()), PATIENCE, || async {
        Ok((acknowledged(host)?.len() >= goal).then_some(()))
    })
    .await;
    let at_work = "select state, wait_event, pg_blocking_pids(pid), pid, xact_start, query from pg_stat_activity where xact_start < now()";
    written.with_context(|| {
        let sessions = host.sql("stillebot", at_work);
        let last = host.run("tail -n 20 /var/log/postgresql/*.log; ls /tmp; ps aux 2>/dev/null || true");
        format!("{:?}\n{}", sessions, last.unwrap_or_default())
    })
}

/// Has both writers rest, until they are told to go on.
async fn pause(hosts: &[Host; 2]) -> Result<()> {
    static ROUND: AtomicU32 = AtomicU32::new(0);
    let round = ROUND.fetch_add(1, Ordering::Relaxed).to_string();
    for host in hosts {
        fs::write(host.path("/tmp/pause"), &round)?;
    }
    for host in hosts {
        wait_until(&format!("the writer of {} to rest", host.name()), PATIENCE, || async {
            Ok(fs::read_to_string(host.path("/tmp/paused")).is_ok_and(|said| said == round).then_some(()))
        })
        .await?;
    }
    Ok(())
}

/// Every row that was acknowledged is on both hosts, which are the same; nothing is left to be resolved; status is content.
async fn assert_well(hosts: &[Host; 2]) -> Result<()> {
    pause(hosts).await?;
    let [sikorsky, gideon] = hosts;
    let sum = "select count(*) || md5(string_agg(c::text, ',' order by id)) from config c";
    wait_until("both databases to be the same", PATIENCE * 2, || async {
        Ok((sikorsky.sql("stillebot", sum)? == gideon.sql("stillebot", sum)?).then_some(()))
    })
    .await?;
    let mut ids = acknowledged(&hosts[0])?;
    ids.extend(acknowledged(&hosts[1])?);
    let missing =
        format!("select count(*) from unnest('{{{}}}'::int[]) i where i not in (select id from config)", ids.join(","));
    let open = "select count(*) from multihome.conflicts where status = 'open'";
    for host in hosts {
        for (what, query) in [("rows", missing.as_str()), ("conflicts", open)] {
            wait_until(&format!("no {what} of {} to be missing or open", host.name()), PATIENCE * 2, || async {
                Ok((host.sql("stillebot", query)? == "0").then_some(()))
            })
            .await?;
        }
        let patience = PATIENCE * 2;
        let what = format!("status on {} to be content", host.name());
        let content = wait_until(&what, patience, || async {
            let Ok(said) = agent(host, "status --json") else { return Ok(None) };
            let status: serde_json::Value = serde_json::from_str(&said)?;
            Ok((status["verdict"]["ready"] == true && status["unfinished_hop"].is_null()).then_some(()))
        });
        content.await.with_context(|| agent(host, "status").unwrap_or_else(|error| format!("{error:#}")))?;
    }
    for host in hosts {
        fs::remove_file(host.path("/tmp/pause"))?;
    }
    Ok(())
}

fn is_up(host: &Host) -> Result<bool> {
    Ok(host.sql("stillebot", "select state from stillebot_status()")? == "up")
}

/// Moves the writable side; tried again, for sessions of a run that was cut off may live on the other side for a moment.
async fn hop(from: &Host, to: &Host) -> Result<()> {
    let hop = format!("hop {} --deadline 20s", to.name());
    let mut said = String::new();
    let done = wait_until(&format!("the hop to {}", to.name()), PATIENCE * 2, || {
        let outcome = agent(from, &hop).map_err(|error| said = format!("{error:#}")).is_ok();
        async move { Ok(outcome.then_some(())) }
    })
    .await;
    done.context(said)?;
    ensure!(is_up(to)? && !is_up(from)?, "after a hop to {}", to.name());
    wait_written(to).await
}

/// A hop that stands still before a step while the cable is cut, goes on without it, and is done again with it.
async fn hop_cut_off(hosts: &[Host; 2], (from, to): (usize, usize), step: &str) -> Result<usize> {
    let (source, target) = (&hosts[from], &hosts[to]);
    let script = format!(
        "exec setpriv --reuid=stillebot --regid=stillebot --clear-groups stillebot-agent hop {} --deadline 3s --pause-at before:{step}",
        target.name()
    );
    let mut run = source.command(&script)?.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let pid = run.id();
    // nsenter stands still with its child, and has it go on when it does.
    wait_until("the hop to stand still", PATIENCE, || async {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')).then_some(()))
    })
    .await?;
    set(hosts, Cable::Cut)?;
    signal::kill(Pid::from_raw(pid.try_into()?), signal::Signal::SIGCONT)?;
    let mut ended = None;
    wait_until("the hop to end without its cable", PATIENCE * 2, || {
        ended = run.try_wait().ok().flatten();
        async move { Ok(ended.map(drop)) }
    })
    .await?;
    let code = ended.and_then(|status| status.code());
    ensure!(matches!(code, Some(0 | 1 | 3 | 69)), "the exit code of a hop without its cable is {code:?}");
    let both = is_up(source)? && is_up(target)?;
    ensure!(!both, "both are writable");
    set(hosts, Cable::Whole)?;
    hop(source, target).await?;
    Ok(to)
}

#[tokio::test]
async fn a_pair_of_hosts_loses_nothing_whatever_befalls_it() -> Result<()> {
    let authority = Authority::new()?;
    let mut hosts = hosts().await?;
    for host in &hosts {
        furnish(host, &authority).await?;
        host.run(
            "cat >>/etc/stillebot/agent.toml <<'END'
[watch]
interval = \"1s\"

[[rule]]
table    = \"public.config\"
strategy = \"newest\"
END",
        )?;
    }
    hosts[0].run(
        "stillebot-agent init --admin operator --admin-cert /srv/operator.pem --admin-key /srv/operator-key.pem --yes",
    )?;
    let mut services = Vec::new();
    let mut writers = Vec::new();
    for (host, first) in hosts.iter().zip([1_000_000, 2_000_000]) {
        services.push(serve(host)?);
        writers.push(write(host, first)?);
    }
    let [sikorsky, gideon] = &hosts;
    wait_written(gideon).await?;

    // The cable is cut; both write on, one row of it the same.
    set(&hosts, Cable::Cut)?;
    for host in &hosts {
        host.sql("stillebot", &format!("insert into config values (1, 'of {}')", host.name()))?;
        wait_written(host).await.context("while the cable is cut")?;
    }
    set(&hosts, Cable::Whole)?;
    let conflicts =
        "select count(*) from multihome.conflicts where conflict_type = 'insert_exists' and status <> 'open'";
    wait_until("the conflict to be resolved by rule", PATIENCE * 3, || async {
        let found = (sikorsky.sql("stillebot", conflicts)?, gideon.sql("stillebot", conflicts)?);
        Ok((found.0 != "0" && found.1 != "0").then_some(()))
    })
    .await
    .context("after the cut")?;
    assert_well(&hosts).await.context("after the cut")?;
    let row = "select value from config where id = 1";
    ensure!(sikorsky.sql("stillebot", row)? == "of gideon" && gideon.sql("stillebot", row)? == "of gideon");

    // A clock is moved: that of PostgreSQL on one host. Not what files say, which is who the node is.
    let clock = "LD_PRELOAD = '/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1'\nFAKETIME = '+5s'\n\
                 FAKETIME_DONT_FAKE_MONOTONIC = '1'\nNO_FAKE_STAT = '1'\n";
    fs::write(gideon.path(&format!("{CLUSTER}/environment")), clock)?;
    gideon.run("pg_ctlcluster 17 main stop")?;
    start_cluster(gideon).await?;
    let report = agent(sikorsky, "check")?;
    ensure!(report.contains("gideon is 5") && report.contains("ms ahead"), "the clock is not warned about: {report}");
    fs::write(gideon.path(&format!("{CLUSTER}/environment")), "")?;
    gideon.run("pg_ctlcluster 17 main stop")?;
    start_cluster(gideon).await?;
    ensure!(!agent(sikorsky, "check")?.contains("ms ahead (± 0"), "the clock is right again");
    assert_well(&hosts).await.context("after the clock")?;

    // A certificate is renewed, as certbot lays it out and calls the package's hook.
    let renewed = authority.request(&["gideon.example.net"]).issue()?;
    let lineage = "/etc/letsencrypt/live/gideon.example.net";
    gideon.run(&format!(
        "cd /etc; mkdir -p letsencrypt/renewal-hooks/deploy letsencrypt/archive/gideon.example.net {lineage}
         ln -s /usr/share/stillebot/certbot-deploy-hook letsencrypt/renewal-hooks/deploy/stillebot
         for name in fullchain privkey; do ln -s ../../archive/gideon.example.net/${{name}}1.pem {lineage}/$name.pem; done
         chmod 700 letsencrypt/archive letsencrypt/live
         cat >>stillebot/agent.toml <<'END'
[[certificate]]
lineage = \"gideon.example.net\"
use     = [\"server\"]
node    = \"gideon\"
cert    = \"{CLUSTER}/certificate.pem\"
key     = \"{CLUSTER}/privkey.pem\"
END"
    ))?;
    let archive = gideon.path("/etc/letsencrypt/archive/gideon.example.net");
    fs::write(archive.join("fullchain1.pem"), renewed.certificate_pem()?)?;
    fs::write(archive.join("privkey1.pem"), renewed.key_pem()?)?;
    gideon.run(&format!(
        "RENEWED_LINEAGE={lineage} RENEWED_DOMAINS=gideon.example.net /etc/letsencrypt/renewal-hooks/deploy/stillebot"
    ))?;
    let served = sikorsky.run(
        "openssl s_client -4 -starttls postgres -connect gideon.example.net:5432 </dev/null 2>/dev/null | openssl x509 -noout -serial",
    )?;
    ensure!(served == format!("serial={}", renewed.serial()?), "{served} is served, not {}", renewed.serial()?);
    // Whoever comes now sees it, and verifies it in full.
    gideon.sql("stillebot", "select count(pg_terminate_backend(pid)) from pg_stat_replication")?;
    wait_written(gideon).await?;
    assert_well(&hosts).await.context("after the renewal")?;

    // One writable side from here on. Packets are lost while it moves, then late, then both.
    agent(sikorsky, "hop sikorsky")?;
    set(&hosts, Cable::Poor)?;
    hop(sikorsky, gideon).await.context("with packets lost")?;
    hop(gideon, sikorsky).await.context("with packets lost")?;
    ensure!(cable::lost(sikorsky)? > 0 && cable::lost(gideon)? > 0, "no packet was lost");
    set(&hosts, Cable::Whole)?;
    assert_well(&hosts).await.context("after lost packets")?;
    let detour = cable::Detour::lay(&hosts, ADDRESSES.map(|(_, address)| address), Duration::from_millis(100)).await?;
    for cable in [Cable::Whole, Cable::Poor] {
        set(&hosts, cable)?;
        hop(sikorsky, gideon).await.context("with packets late")?;
        hop(gideon, sikorsky).await.context("with packets late")?;
    }
    set(&hosts, Cable::Whole)?;
    assert_well(&hosts).await.context("with packets late")?;
    detour.remove(&hosts)?;
    assert_well(&hosts).await.context("after late packets")?;

    // The host of the node that is down loses power, and comes back as it was; its agent and its client with it.
    hosts[1].power_cycle().await?;
    let [sikorsky, gideon] = &hosts;
    sikorsky.run("ip link delete eth0 2>/dev/null || true")?;
    sikorsky.connect(ADDRESSES[0].1, gideon, ADDRESSES[1].1)?;
    start_cluster(gideon).await?;
    for (child, again) in [(&mut services[1], serve(gideon)?), (&mut writers[1], write(gideon, 3_000_000)?)] {
        child.wait()?;
        *child = again;
    }
    ensure!(!is_up(gideon)? && is_up(sikorsky)?, "after the loss of power");
    wait_written(sikorsky).await.context("after the loss of power")?;
    assert_well(&hosts).await.context("after the loss of power")?;

    let [sikorsky, gideon] = &hosts;
    let mut at = 0;
    for step in STEPS {
        at = hop_cut_off(&hosts, (at, 1 - at), step).await.with_context(|| format!("cut before {step}"))?;
        assert_well(&hosts).await.with_context(|| format!("after the cut before {step}"))?;
    }

    for (host, writer) in hosts.iter().zip(&mut writers) {
        host.run("touch /tmp/stop")?;
        wait_until("the writer to end", PATIENCE, || {
            let ended = writer.try_wait();
            async move { Ok(ended?.map(drop)) }
        })
        .await?;
    }
    for service in &mut services {
        ensure!(service.try_wait()?.is_none(), "an agent has ended");
        service.kill()?;
        service.wait()?;
    }
    for host in &hosts {
        host.run("pg_ctlcluster 17 main stop")?;
        check_log(
            host,
            &[
                " 25006 ",
                " 23505 ",
                " 08006 ",
                " 57P0",
                " 55006 ",
                "could not connect to the publisher",
                "could not receive data from WAL stream",
                "is active for PID",
                "terminating logical replication worker",
            ],
        )?;
    }
    Ok(())
}
