//! They install beside Debian's own PostgreSQL, are upgraded without losing a database's state, and leave nothing behind.

use std::fs;

use anyhow::{Result, ensure};
use stillebot_tests::Host;

use crate::{check_log, create_cluster, install, start_cluster};

#[tokio::test]
async fn the_packages_install_are_upgraded_and_are_removed_on_a_debian_host() -> Result<()> {
    let host = Host::start("sikorsky").await?;
    install(&host)?;
    host.run(
        "getent passwd stillebot | grep -q nologin
         test -d /etc/stillebot
         stillebot-agent --version | grep -q '^stillebot-agent [0-9]'
         test -s /usr/share/man/man1/stillebot-agent-hop.1.gz
         test -s /usr/share/bash-completion/completions/stillebot-agent
         test -s /usr/share/zsh/vendor-completions/_stillebot-agent
         test -s /usr/share/fish/vendor_completions.d/stillebot-agent.fish
         grep -q '^ExecStart=/usr/bin/stillebot-agent' /usr/lib/systemd/system/stillebot-agent.service
         test -L /etc/systemd/system/multi-user.target.wants/stillebot-agent.service
         test -s /usr/share/doc/stillebot-agent/examples/agent.toml
         test -x /usr/share/stillebot/certbot-deploy-hook
         dpkg --verify stillebot-agent postgresql-17-stillebot",
    )?;
    // The example is a configuration; that its nodes do not answer is another matter.
    let answer = host.run(
        "cp /usr/share/doc/stillebot-agent/examples/agent.toml /etc/stillebot/
         sed -i '/^\\(root\\|cert\\|key\\) /d' /etc/stillebot/agent.toml
         code=0; stillebot-agent status >/dev/null 2>/tmp/said || code=$?; echo $code; cat /tmp/said",
    )?;
    ensure!(answer.starts_with("69"), "{answer}");

    create_cluster(&host).await?;
    host.sql("postgres", "create database stillebot")?;
    host.sql("stillebot", "create extension stillebot version '0.3.0'; create table t (id int primary key)")?;
    host.sql("stillebot", "select stillebot_down('upgrade')")?;

    // A later package: the same with another version.
    host.run(
        "cd /srv; for deb in *.deb; do dpkg-deb -R $deb unpacked; sed -i 's/^Version: .*/&+later/' unpacked/DEBIAN/control
         dpkg-deb -b unpacked later-$deb >/dev/null; rm -r unpacked $deb; done; dpkg -i later-*.deb
         dpkg-query -W -f '${Version}' stillebot-agent | grep -q later
         pg_ctlcluster 17 main restart",
    )?;
    let state = host.sql("stillebot", "select state, by_whom, reason from stillebot_status()")?;
    ensure!(state == "down|postgres|upgrade", "{state}");
    host.sql("stillebot", "select stillebot_up()")?;
    host.sql("stillebot", "alter extension stillebot update")?;
    let version = host.sql("stillebot", "select extversion from pg_extension where extname = 'stillebot'")?;
    ensure!(version == env!("CARGO_PKG_VERSION"), "{version}");
    host.sql("stillebot", "insert into t values (1)")?;

    host.sql("stillebot", "drop extension stillebot")?;
    host.run("sed -i '/stillebot/d' /etc/postgresql/17/main/conf.d/stillebot.conf; pg_ctlcluster 17 main restart")?;
    let configuration = fs::read_to_string(host.path("/etc/stillebot/agent.toml"))?;
    host.run("dpkg -P stillebot-agent postgresql-17-stillebot")?;
    ensure!(host.sql("stillebot", "insert into t values (2); select count(*) from t")? == "2");
    let left = host.run("find / -xdev -name '*stillebot*' -not -path '/proc/*' -not -path '/srv/*'")?;
    let expected = ["/etc/postgresql/17/main/conf.d/stillebot.conf", "/etc/stillebot"];
    ensure!(left.lines().all(|path| expected.contains(&path)), "left behind:\n{left}");
    // The operator's own file is no business of a package that did not bring it.
    ensure!(fs::read_to_string(host.path("/etc/stillebot/agent.toml"))? == configuration);
    host.run("pg_ctlcluster 17 main stop")?;
    check_log(&host, &[])
}

#[tokio::test]
async fn a_host_that_loses_power_while_its_database_is_down_comes_back_down() -> Result<()> {
    let mut host = Host::start("gideon").await?;
    install(&host)?;
    create_cluster(&host).await?;
    host.sql("postgres", "create database stillebot")?;
    host.sql("stillebot", "create extension stillebot; create table t (id int primary key)")?;
    host.sql("stillebot", "select stillebot_down('power')")?;
    host.power_cycle().await?;
    start_cluster(&host).await?;
    let state = host.sql("stillebot", "select state, reason from stillebot_status()")?;
    ensure!(state == "down|power", "{state}");
    let refused = host.sql("stillebot", "insert into t values (1)").expect_err("it is down");
    ensure!(format!("{refused:#}").contains("taken down by postgres"), "{refused:#}");
    host.sql("stillebot", "select stillebot_up()")?;
    host.sql("stillebot", "insert into t values (1)")?;
    host.run("pg_ctlcluster 17 main stop")?;
    check_log(&host, &[" 25006 "])
}
