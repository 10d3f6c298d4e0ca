//! Two whole hosts, each with a name and an address of its own, become a pair by the steps of the README.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use stillebot_tests::wait::PATIENCE;
use stillebot_tests::{Authority, Host, wait_until};

use crate::{check_log, create_cluster, install};

/// Where a host's certificates are, and what PostgreSQL is told of them.
pub const CLUSTER: &str = "/etc/postgresql/17/main";
pub const ADDRESSES: [(&str, &str); 2] = [("sikorsky", "10.99.0.1"), ("gideon", "10.99.0.2")];

/// Two hosts on one cable, with names that resolve; gideon's also to an IPv6 address that leads nowhere.
pub async fn hosts() -> Result<[Host; 2]> {
    let hosts = [Host::start("sikorsky").await?, Host::start("gideon").await?];
    hosts[0].connect(ADDRESSES[0].1, &hosts[1], ADDRESSES[1].1)?;
    for host in &hosts {
        let mut names = String::from("127.0.0.1 localhost\n");
        for (name, address) in ADDRESSES {
            names += &format!("{address} {name}.example.net\n");
        }
        // Nobody has it, and nothing says so: packets to it go out and are never answered.
        names += "2001:db8::dead gideon.example.net\n";
        fs::write(host.path("/etc/hosts"), names)?;
        host.run("ip -6 address add fe80::1/64 dev eth0 nodad 2>/dev/null || true; ip -6 route add 2001:db8::/64 dev eth0 2>/dev/null || true")?;
    }
    Ok(hosts)
}

fn place(host: &Host, path: &str, content: &[u8], owner: &str) -> Result<()> {
    let file = host.path(path);
    fs::write(&file, content).with_context(|| path.to_owned())?;
    fs::set_permissions(&file, Permissions::from_mode(if path.ends_with("key.pem") { 0o600 } else { 0o644 }))?;
    host.run(&format!("chown {owner}: {path}")).map(drop)
}

/// Step 1 to 3 of the README.
pub async fn furnish(host: &Host, authority: &Authority) -> Result<()> {
    install(host)?;
    create_cluster(host).await?;
    let name = format!("{}.example.net", host.name());
    let server = authority.server(&[name])?;
    place(host, &format!("{CLUSTER}/certificate.pem"), &server.certificate_pem()?, "postgres")?;
    place(host, &format!("{CLUSTER}/privkey.pem"), &server.key_pem()?, "postgres")?;
    for (role, folder, owner) in
        [("replicator", CLUSTER, "postgres"), ("stillebot_agent", "/etc/stillebot", "stillebot")]
    {
        let client = authority.client(role)?;
        place(host, &format!("{folder}/root.pem"), &authority.root_pem()?, owner)?;
        place(host, &format!("{folder}/{role}.pem"), &client.certificate_pem()?, owner)?;
        place(host, &format!("{folder}/{role}-key.pem"), &client.key_pem()?, owner)?;
    }
    let admin = authority.client("operator")?;
    place(host, "/srv/operator.pem", &admin.certificate_pem()?, "root")?;
    place(host, "/srv/operator-key.pem", &admin.key_pem()?, "root")?;
    host.run(&format!(
        "cat >>{CLUSTER}/conf.d/stillebot.conf <<'END'
ssl = on
ssl_cert_file = '{CLUSTER}/certificate.pem'
ssl_key_file = '{CLUSTER}/privkey.pem'
ssl_ca_file = '{CLUSTER}/root.pem'
max_slot_wal_keep_size = '1GB'
max_replication_slots = 20
max_worker_processes = 24
END
cat >{CLUSTER}/pg_hba.conf <<'END'
local   all        all                                              peer
hostssl stillebot  replicator,stillebot_agent,operator  10.99.0.0/24  cert
END
cat >/etc/stillebot/agent.toml <<'END'
database = \"stillebot\"
user     = \"stillebot_agent\"

[tls]
root = \"/etc/stillebot/root.pem\"
cert = \"/etc/stillebot/stillebot_agent.pem\"
key  = \"/etc/stillebot/stillebot_agent-key.pem\"

[replication]
root = \"{CLUSTER}/root.pem\"
cert = \"{CLUSTER}/replicator.pem\"
key  = \"{CLUSTER}/replicator-key.pem\"

[[node]]
name = \"sikorsky\"
host = \"sikorsky.example.net\"

[[node]]
name = \"gideon\"
host = \"gideon.example.net\"
END
pg_ctlcluster 17 main restart"
    ))?;
    host.sql("postgres", "create role operator superuser login")?;
    host.sql("postgres", "create database stillebot")?;
    host.sql("stillebot", "create table config (id int primary key, value text)").map(drop)
}

/// A command of the agent as the unit's user would give it.
pub fn agent(host: &Host, arguments: &str) -> Result<String> {
    host.run(&format!("setpriv --reuid=stillebot --regid=stillebot --clear-groups stillebot-agent {arguments}"))
}

#[tokio::test]
async fn two_debian_hosts_become_a_pair_hop_and_come_back_as_they_were() -> Result<()> {
    let authority = Authority::new()?;
    let [sikorsky, mut gideon] = hosts().await?;
    for host in [&sikorsky, &gideon] {
        furnish(host, &authority).await?;
    }
    sikorsky.sql("stillebot", "insert into config select i, 'v' || i from generate_series(1, 20000) i")?;

    let init = "stillebot-agent init --admin operator --admin-cert /srv/operator.pem --admin-key /srv/operator-key.pem";
    let plan = sikorsky.run(&format!("{init} --dry-run"))?;
    ensure!(plan.contains("create subscription") && plan.contains("gideon.example.net"), "{plan}");
    ensure!(sikorsky.sql("stillebot", "select count(*) from pg_publication")? == "0");
    sikorsky.run(&format!("{init} --yes"))?;
    ensure!(gideon.sql("stillebot", "select count(*) from config")? == "20000");
    let again = sikorsky.run(&format!("{init} --yes"))?;
    ensure!(again.contains("nothing to do"), "{again}");
    // From the other host as well, without a right of the superuser; the dead address is told, and costs a second.
    let report = agent(&gideon, "check --json")?;
    ensure!(report.contains("2001:db8::dead"), "{report}");
    let began = Instant::now();
    let status = agent(&sikorsky, "status")?;
    ensure!(began.elapsed().as_secs() < 10, "a dead address costs {:?}", began.elapsed());
    ensure!(status.contains("connected"), "{status}");

    agent(&sikorsky, "hop gideon")?;
    gideon.sql("stillebot", "insert into config values (0, 'on gideon')")?;
    let arrived = async |host: &Host, id: i32| {
        wait_until(&format!("row {id} on {}", host.name()), PATIENCE, || async {
            let rows = host.sql("stillebot", &format!("select count(*) from config where id = {id}"))?;
            Ok((rows == "1").then_some(()))
        })
        .await
    };
    arrived(&sikorsky, 0).await?;

    // The host of the node that is down loses power, and comes back as it was.
    agent(&gideon, "hop sikorsky")?;
    gideon.power_cycle().await?;
    sikorsky.run("ip link delete eth0 2>/dev/null || true")?;
    sikorsky.connect(ADDRESSES[0].1, &gideon, ADDRESSES[1].1)?;
    crate::start_cluster(&gideon).await?;
    ensure!(gideon.sql("stillebot", "select state from stillebot_status()")? == "down");
    sikorsky.sql("stillebot", "insert into config values (-1, 'on sikorsky')")?;
    arrived(&gideon, -1).await?;
    ensure!(
        sikorsky.sql("stillebot", "select md5(string_agg(c::text, ',' order by id)) from config c")?
            == gideon.sql("stillebot", "select md5(string_agg(c::text, ',' order by id)) from config c")?
    );

    let gone = sikorsky.run(
        "stillebot-agent up gideon >/dev/null; stillebot-agent deinit --yes --admin operator --admin-cert /srv/operator.pem \
         --admin-key /srv/operator-key.pem",
    )?;
    for host in [&sikorsky, &gideon] {
        let left = host.sql(
            "stillebot",
            "select (select count(*) from pg_subscription) + (select count(*) from pg_replication_slots)
             + (select count(*) from pg_publication) + (select count(*) from pg_extension where extname = 'stillebot')",
        )?;
        ensure!(left == "0", "{}: {left} things left: {gone}", host.name());
        ensure!(host.sql("stillebot", "select count(*) from config")? == "20002");
        host.run("pg_ctlcluster 17 main stop")?;
        check_log(
            host,
            &[
                " 08006 ",
                " 57P0",
                " 55006 ",
                "could not connect to the publisher",
                "terminating logical replication worker",
            ],
        )?;
    }
    Ok(())
}
