//! A renewed certificate is in use, proven, or the old one is; whatever fails, and whenever the power does.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{Uid, User};
use openssl::pkey::PKey;
use openssl::x509::X509;
use serde_json::Value;
use stillebot_agent::cmd::certs::STEPS;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Authority, Cluster, Identity, Server, Shutdown, wait_until};

use crate::PATIENCE;
use crate::runs::{Run, Started, agent};
use crate::watch::Watch;

/// The name of the certificate at certbot's.
const LINEAGE: &str = "sikorsky.example.net";
/// What a certificate of the node has to be issued for: the place where the agent reaches it.
const NAMES: [&str; 2] = ["127.0.0.1", "sikorsky.example.net"];
const DAY: i64 = 86_400;

/// Sikorsky's host: a directory as /etc/postgresql/17/main, of PostgreSQL's user, with one pair in it that is both the server's
/// and its subscription's; and one as certbot's, of whoever runs the tests.
pub struct Host {
    pub cluster: Cluster,
    places: PathBuf,
    live: PathBuf,
    old: Identity,
}

impl Host {
    async fn new() -> Result<Self> {
        let cluster = Cluster::builder().direct().start().await?;
        let sikorsky = cluster.node("sikorsky");
        // Apply workers are ended to have them connect anew.
        cluster.expect_log(" 57P01 ");
        // The next one may be there before the last has let go of the subscription's origin; it tries again.
        cluster.expect_log("is already active for PID");
        cluster.expect_log("is active for PID");
        let data = fs::metadata(sikorsky.data_directory())?;
        let (uid, gid) = (data.uid(), data.gid());
        let owner = User::from_uid(Uid::from_raw(uid))?.context("who runs the servers?")?.name;
        let places = sikorsky.socket_directory().join("main");
        fs::create_dir(&places)?;
        chown(&places, Some(uid), Some(gid))?;
        let old = certificate().valid(-40 * DAY, 50 * DAY).issue()?;
        for (name, content) in [("certificate.pem", old.certificate_pem()?), ("privkey.pem", old.key_pem()?)] {
            fs::write(places.join(name), content)?;
            fs::set_permissions(places.join(name), fs::Permissions::from_mode(0o600))?;
            chown(places.join(name), Some(uid), Some(gid))?;
        }
        let live = cluster.agent_configuration().with_file_name("live");
        fs::create_dir(&live)?;
        let host = Self { cluster, places, live, old };
        host.configure(&owner)?;
        host.use_places().await?;
        Ok(host)
    }

    /// In agent.toml.
    fn configure(&self, owner: &str) -> Result<()> {
        let path = self.cluster.agent_configuration();
        let state = path.with_file_name("state");
        let places = self.places.display();
        let text = format!(
            r#"state = "{}"
{}
[replication]
cert = "{places}/certificate.pem"
key  = "{places}/privkey.pem"

[[certificate]]
lineage = "{LINEAGE}"
use     = ["server", "replication"]
node    = "sikorsky"
cert    = "{places}/certificate.pem"
key     = "{places}/privkey.pem"
owner   = "{owner}"
"#,
            state.display(),
            fs::read_to_string(&path)?,
        );
        Ok(fs::write(path, text)?)
    }

    /// By the server and its subscription.
    async fn use_places(&self) -> Result<()> {
        let sikorsky = self.cluster.node("sikorsky");
        let path = |name: &str| self.places.join(name).to_string_lossy().into_owned();
        let (cert, key) = (path("certificate.pem"), path("privkey.pem"));
        sikorsky.config(&[("ssl_cert_file", &cert), ("ssl_key_file", &key)]).await?;
        self.connect_with(Path::new(&cert), Path::new(&key)).await?;
        let old = self.old.serial()?;
        wait_until("the subscription to use the files", PATIENCE, || async {
            Ok((self.presented_to_gideon().await? == Some(old.clone())).then_some(()))
        })
        .await
    }

    fn sikorsky(&self) -> &Server {
        self.cluster.node("sikorsky")
    }

    /// What certbot does.
    fn renew(&self, identity: &Identity) -> Result<PathBuf> {
        self.renew_with(&identity.certificate_pem()?, &identity.key_pem()?)
    }

    fn renew_with(&self, certificate: &[u8], key: &[u8]) -> Result<PathBuf> {
        let lineage = self.live.join(LINEAGE);
        fs::create_dir_all(&lineage)?;
        fs::write(lineage.join("fullchain.pem"), certificate)?;
        fs::write(lineage.join("privkey.pem"), key)?;
        fs::set_permissions(lineage.join("privkey.pem"), fs::Permissions::from_mode(0o600))?;
        Ok(lineage)
    }

    async fn deploy(&self) -> Result<Run> {
        let lineage = self.live.join(LINEAGE);
        agent(&self.cluster, &["certs", "deploy", "--lineage", &lineage.to_string_lossy()]).await
    }

    async fn check(&self) -> Result<Run> {
        agent(&self.cluster, &["certs", "check"]).await
    }

    /// The serial number, hexadecimal, that sikorsky's subscription has presented to gideon.
    async fn presented_to_gideon(&self) -> Result<Option<String>> {
        let decimal = serial_at(self.cluster.node("gideon")).await?;
        decimal.map(|decimal| Ok(openssl::bn::BigNum::from_dec_str(&decimal)?.to_hex_str()?.to_string())).transpose()
    }

    /// What whoever opens the two files gets is a pair, of this serial.
    fn assert_files(&self, serial: &str) -> Result<()> {
        ensure!(self.pair()? == serial, "the files are another pair");
        Ok(())
    }

    /// The serial number of the pair that is in the files.
    fn pair(&self) -> Result<String> {
        let certificate = X509::from_pem(&fs::read(self.places.join("certificate.pem"))?)?;
        let key = PKey::private_key_from_pem(&fs::read(self.places.join("privkey.pem"))?)?;
        ensure!(key.public_eq(certificate.public_key()?.as_ref()), "the files are no pair");
        Ok(certificate.serial_number().to_bn()?.to_hex_str()?.to_string())
    }

    /// The pair is in the files, served, and used by the subscription.
    async fn assert_in_use(&self, identity: &Identity) -> Result<()> {
        let serial = identity.serial()?;
        self.assert_files(&serial)?;
        let served = self.sikorsky().endpoint().presented_serial().await?;
        ensure!(served == serial, "another certificate is served");
        // A subscription that was put back may be on its way.
        wait_until("the subscription to use it", PATIENCE, || async {
            Ok((self.presented_to_gideon().await? == Some(serial.clone())).then_some(()))
        })
        .await
    }

    /// All of this host is well; until when the peer's certificate lasts is for its own host to see.
    async fn assert_well(&self) -> Result<()> {
        let run = self.check().await?.expect_code(0)?;
        for finding in run.json["certificates"].as_array().context("no certificates")? {
            let unseen = finding["node"] == "gideon" && finding["level"] == "unknown";
            ensure!(finding["level"] == "well" || unseen, "{finding:#}");
        }
        Ok(())
    }

    /// How the last deployment ended, as it is remembered.
    fn note(&self) -> Result<Value> {
        let state = self.cluster.agent_configuration().with_file_name("state");
        Ok(serde_json::from_slice(&fs::read(state.join(format!("certificates/{LINEAGE}.json")))?)?)
    }

    /// Has subscriptions use files of their own, in a directory beside the server's: as the configuration and the subscription have it.
    async fn give_subscriptions_files_of_their_own(&self, identity: &Identity) -> Result<PathBuf> {
        let clients = self.places.with_file_name("clients");
        fs::create_dir(&clients)?;
        let like = fs::metadata(&self.places)?;
        chown(&clients, Some(like.uid()), Some(like.gid()))?;
        for (name, content) in [("client.pem", identity.certificate_pem()?), ("client.key", identity.key_pem()?)] {
            fs::write(clients.join(name), content)?;
            fs::set_permissions(clients.join(name), fs::Permissions::from_mode(0o600))?;
            chown(clients.join(name), Some(like.uid()), Some(like.gid()))?;
        }
        let path = self.cluster.agent_configuration();
        let text = fs::read_to_string(&path)?;
        let owner = User::from_uid(Uid::from_raw(like.uid()))?.context("who runs the servers?")?.name;
        let entry = format!(
            "\n[[certificate]]\nlineage = \"{LINEAGE}\"\nuse = \"replication\"\nnode = \"sikorsky\"\n\
             cert = \"{clients}/client.pem\"\nkey = \"{clients}/client.key\"\nowner = \"{owner}\"\n",
            clients = clients.display()
        );
        fs::write(&path, text.replace("[\"server\", \"replication\"]", "[\"server\"]") + &entry)?;
        self.connect_with(&clients.join("client.pem"), &clients.join("client.key")).await?;
        Ok(clients)
    }

    /// The subscription, from now on.
    async fn connect_with(&self, cert: &Path, key: &Path) -> Result<()> {
        let (sikorsky, gideon) = (self.cluster.node("sikorsky"), self.cluster.node("gideon"));
        let root = sikorsky.socket_directory().join("tls/root.pem");
        let statement = format!(
            "alter subscription multihome connection 'host=127.0.0.1 port={} dbname={DATABASE} user=replicator \
             sslmode=verify-full sslrootcert={} sslcert={} sslkey={} application_name=multihome'",
            gideon.port(),
            root.display(),
            cert.display(),
            key.display()
        );
        sikorsky.execute(DATABASE, &statement).await
    }

    /// How a certificate stands according to `certs check`.
    async fn finding(&self, what: &str) -> Result<Value> {
        let run = self.check().await?;
        let all = run.json["certificates"].as_array().context("no certificates")?;
        let found = all.iter().find(|finding| {
            finding["node"] == "sikorsky" && finding["what"].as_str().is_some_and(|name| name.starts_with(what))
        });
        Ok(found.cloned().unwrap_or_default())
    }

    /// Nothing is left over, and rows go both ways.
    async fn finish(self) -> Result<()> {
        for (node, id) in [("sikorsky", 101), ("gideon", 102)] {
            let write = format!("insert into stillebot.raids values ({id}, {id})");
            self.cluster.node(node).execute(DATABASE, &write).await?;
        }
        self.cluster.wait_replicated().await?;
        self.cluster.assert_identical().await?;
        self.cluster.finish().await
    }
}

/// A certificate that will do, unless it is described otherwise.
fn certificate() -> stillebot_tests::authority::Request<'static> {
    Authority::shared().request(&NAMES).role("replicator")
}

#[tokio::test]
async fn a_renewed_certificate_is_served_and_the_subscription_connects_with_it() -> Result<()> {
    let host = Host::new().await?;
    host.assert_in_use(&host.old).await?;
    let owner = fs::metadata(host.places.join("privkey.pem"))?.uid();
    for (round, identity) in [certificate().issue()?, certificate().rsa().issue()?].iter().enumerate() {
        host.renew(identity)?;
        let run = host.deploy().await?.expect_code(0)?;
        ensure!(run.json["changed"] == true, "{run:#?}");
        host.assert_in_use(identity).await?;
        let key = fs::metadata(host.places.join("privkey.pem"))?;
        ensure!(key.mode() & 0o7777 == 0o600 && key.uid() == owner, "{:o} {}", key.mode(), key.uid());
        host.assert_well().await?;
        // The present one, and the last, to go back to.
        let versions = fs::read_dir(host.places.join(".certificate.pem"))?.count();
        ensure!(versions == 3, "round {round}: {versions} entries");
        // Again, nothing happens.
        let sender = "select pid from pg_stat_replication where application_name = 'multihome'";
        let before: i32 = host.cluster.node("gideon").value(DATABASE, sender).await?;
        let run = host.deploy().await?.expect_code(0)?;
        ensure!(run.json["changed"] == false, "{run:#?}");
        ensure!(before == host.cluster.node("gideon").value::<i32>(DATABASE, sender).await?, "it connected anew");
    }
    host.finish().await
}

#[tokio::test]
async fn chains_with_intermediates_and_cross_signed_ones_are_deployed() -> Result<()> {
    let host = Host::new().await?;
    let stranger = Authority::named("an older root")?;
    let between = Authority::shared().subordinate("R10")?;
    let crossed = Authority::shared().subordinate("R11")?.cross_signed_by(&stranger)?;
    for authority in [&between, &crossed] {
        for rsa in [true, false] {
            let request = authority.request(&NAMES).role("replicator");
            let identity = if rsa { request.rsa() } else { request }.issue()?;
            host.renew(&identity)?;
            host.deploy().await?.expect_code(0)?;
            host.assert_in_use(&identity).await?;
        }
    }
    host.assert_well().await?;
    host.finish().await
}

#[tokio::test]
async fn what_is_not_good_enough_is_refused_and_nothing_changes() -> Result<()> {
    let host = Host::new().await?;
    let (good, other) = (certificate().issue()?, certificate().issue()?);
    let foreign = Authority::named("somebody else")?;
    let named = ["127.0.0.1"];
    let elsewhere = ["gideon.example.net"];
    let flawed = |identity: Identity| anyhow::Ok((identity.certificate_pem()?, identity.key_pem()?));
    for (what, (certificate, key)) in [
        ("does not belong to the certificate", (good.certificate_pem()?, other.key_pem()?)),
        ("the key is encrypted", (good.certificate_pem()?, good.encrypted_key_pem()?)),
        ("holds no PEM key", (good.certificate_pem()?, good.certificate_pem()?)),
        ("expired on", flawed(certificate().valid(-90 * DAY, -60).issue()?)?),
        ("in a day or less", flawed(certificate().valid(-DAY, DAY - 60).issue()?)?),
        ("is not valid before", flawed(certificate().valid(3600, 90 * DAY).issue()?)?),
        ("is older than what is there", flawed(certificate().valid(-50 * DAY, 40 * DAY).issue()?)?),
        ("does not lead to the root", flawed(foreign.request(&named).issue()?)?),
        ("is not issued for 127.0.0.1", flawed(Authority::shared().request(&elsewhere).issue()?)?),
        ("is not issued for a client", flawed(certificate().servers_only().issue()?)?),
    ] {
        host.renew_with(&certificate, &key)?;
        let run = host.deploy().await?.expect_code(1)?;
        ensure!(run.says(what) && run.says("nothing was changed"), "{what}: {run:#?}");
        ensure!(!run.stderr.contains("PRIVATE") && !run.json.to_string().contains("PRIVATE"), "{run:#?}");
        let finding = host.finding("deployment of").await?;
        ensure!(finding["text"].as_str().is_some_and(|text| text.contains(what)), "{finding:#}");
    }
    // What cannot be read, by nobody.
    fs::remove_file(host.live.join(LINEAGE).join("privkey.pem"))?;
    fs::create_dir(host.live.join(LINEAGE).join("privkey.pem"))?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("cannot read") && run.says("privkey.pem"), "{run:#?}");
    fs::remove_dir_all(host.live.join(LINEAGE))?;
    ensure!(host.deploy().await?.expect_code(1)?.says("cannot read"));
    host.check().await?.expect_code(1)?;
    ensure!(!host.places.join(".certificate.pem").exists(), "something was written");
    host.assert_in_use(&host.old).await?;
    // And the next good one ends it.
    host.renew(&good)?;
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    host.check().await?.expect_code(0)?;
    host.finish().await
}

#[tokio::test]
async fn where_files_cannot_be_put_nothing_changes() -> Result<()> {
    let host = Host::new().await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    // A path that leads out of the directory.
    let (path, aside) = (host.places.join("certificate.pem"), host.places.join("aside"));
    let victim = host.live.join("victim");
    fs::write(&victim, "untouched")?;
    fs::rename(&path, &aside)?;
    symlink(&victim, &path)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("is a symbolic link to") && run.says("nothing was changed"), "{run:#?}");
    fs::remove_file(&path)?;
    fs::rename(&aside, &path)?;
    symlink(&host.live, host.places.join(".certificate.pem"))?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("cannot open"), "{run:#?}");
    fs::remove_file(host.places.join(".certificate.pem"))?;
    ensure!(fs::read_to_string(&victim)? == "untouched" && fs::read_dir(&host.live)?.count() == 2);
    // A directory that is a link.
    let real = host.places.with_file_name("real");
    fs::rename(&host.places, &real)?;
    symlink(&real, &host.places)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("is a symbolic link") && run.says("nothing was changed"), "{run:#?}");
    ensure!(!real.join(".certificate.pem").exists(), "something was written");
    fs::remove_file(&host.places)?;
    fs::rename(&real, &host.places)?;
    // One of somebody else.
    let like = fs::metadata(&host.places)?;
    chown(&host.places, Some(65_534), None)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("belongs to neither root nor the files' owner"), "{run:#?}");
    chown(&host.places, Some(like.uid()), None)?;
    // A directory that is not there.
    let moved = host.places.with_file_name("moved");
    fs::rename(&host.places, &moved)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("cannot open the directory"), "{run:#?}");
    fs::rename(&moved, &host.places)?;
    host.assert_in_use(&host.old).await?;
    host.finish().await
}

/// A file system of a few pages in the place of a directory, until it is dropped.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(path: &Path, size: &str) -> Result<Self> {
        let options = format!("size={size}");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status()?;
        ensure!(done.success(), "mount failed");
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_changes_nothing() -> Result<()> {
    if !Uid::effective().is_root() {
        eprintln!("not proven: only root can mount a small file system");
        return Ok(());
    }
    let host = Host::new().await?;
    let aside = host.places.with_file_name("aside");
    fs::create_dir(&aside)?;
    let copy = |from: &Path, to: &Path| -> Result<()> {
        let done = Command::new("cp").args(["-a", "--"]).arg(from.join(".")).arg(to).status()?;
        ensure!(done.success(), "cp failed");
        Ok(())
    };
    copy(&host.places, &aside)?;
    // The two files that are there and hardly more.
    let tiny = Tiny::mount(&host.places, "12k")?;
    copy(&aside, &host.places)?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("No space left on device") && run.says("nothing was changed"), "{run:#?}");
    host.assert_in_use(&host.old).await?;
    host.sikorsky().restart().await?;
    host.assert_in_use(&host.old).await?;
    drop(tiny);
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    host.finish().await
}

#[tokio::test]
async fn a_server_that_is_down_serves_it_from_its_next_start() -> Result<()> {
    let host = Host::new().await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    host.sikorsky().stop(Shutdown::Fast).await?;
    let run = host.deploy().await?.expect_code(0)?;
    ensure!(run.json["proofs"].to_string().contains("is served from its next start"), "{run:#?}");
    host.assert_files(&good.serial()?)?;
    host.sikorsky().start().await?;
    host.assert_in_use(&good).await?;
    host.check().await?.expect_code(0)?;
    host.finish().await
}

#[tokio::test]
async fn a_reload_that_is_refused_brings_the_old_one_back() -> Result<()> {
    let host = Host::new().await?;
    host.cluster.expect_log(" 42501 ");
    let good = certificate().issue()?;
    host.renew(&good)?;
    let verb = "execute on function pg_reload_conf()";
    host.sikorsky().execute(DATABASE, &format!("revoke {verb} from stillebot_agent")).await?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("the old certificate is back") && run.says(&format!("grant {verb}")), "{run:#?}");
    host.assert_in_use(&host.old).await?;
    host.check().await?.expect_code(1)?;
    host.sikorsky().execute(DATABASE, &format!("grant {verb} to stillebot_agent")).await?;
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    host.finish().await
}

/// The server takes it, and the peer of its subscription does not: its common name is no role.
#[tokio::test]
async fn a_subscription_that_is_not_let_in_brings_the_old_one_back() -> Result<()> {
    let host = Host::new().await?;
    host.cluster.expect_log(" 28000 ");
    host.cluster.expect_log("could not connect to the publisher");
    let stranger = Authority::shared().request(&NAMES).role("nobody").issue()?;
    host.renew(&stranger)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("did not connect to gideon") && run.says("the old certificate is back"), "{run:#?}");
    host.assert_in_use(&host.old).await?;
    host.finish().await
}

/// An expired certificate keeps everybody who verifies it away, and must not keep its successor away.
#[tokio::test]
async fn an_expired_certificate_is_replaced() -> Result<()> {
    let host = Host::new().await?;
    let expired = Authority::shared().request(&NAMES).valid(-90 * DAY, -60).issue()?;
    let expired = (expired.serial()?, host.renew(&expired)?);
    // As if time had passed.
    for (from, to) in [("fullchain.pem", "certificate.pem"), ("privkey.pem", "privkey.pem")] {
        fs::write(host.places.join(to), fs::read(expired.1.join(from))?)?;
    }
    host.sikorsky().reload().await?;
    host.cluster.expect_log(" 08006 ");
    ensure!(host.sikorsky().endpoint().presented_serial().await? == expired.0);
    let finding = host.finding("server").await?;
    ensure!(finding["level"] == "error" && finding["text"].to_string().contains("expired on"), "{finding:#}");
    let good = certificate().issue()?;
    host.renew(&good)?;
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    host.finish().await
}

/// Whatever is killed at whatever step: who starts then finds a pair, and the next run does all that is left to do.
#[tokio::test]
async fn killed_at_any_step_a_pair_is_left_and_the_next_run_ends_it() -> Result<()> {
    let host = Host::new().await?;
    let mut present = host.old.serial()?;
    for step in STEPS {
        // Once with files from before the first deployment, and once with links.
        let place = format!("after:{step}");
        let next = certificate().issue()?;
        let lineage = host.renew(&next)?;
        let arguments = ["certs", "deploy", "--lineage", &lineage.to_string_lossy()];
        let mut paused = Started::paused(&host.cluster, &arguments, &place).await?;
        paused.signal(Signal::SIGKILL)?;
        paused.end().await?;
        let switched = STEPS.iter().position(|s| *s == step) >= STEPS.iter().position(|s| *s == "switch");
        let left = if switched { next.serial()? } else { present.clone() };
        host.assert_files(&left).with_context(|| place.clone())?;
        host.sikorsky().restart().await.with_context(|| place.clone())?;
        ensure!(host.sikorsky().endpoint().presented_serial().await? == left, "{place}: another is served");
        let finding = host.finding("deployment of").await?;
        ensure!(finding["text"].to_string().contains("it was cut off"), "{place}: {finding:#}");
        host.deploy().await?.expect_code(0).with_context(|| place.clone())?;
        host.assert_in_use(&next).await.with_context(|| place)?;
        present = next.serial()?;
    }
    host.check().await?.expect_code(0)?;
    host.finish().await
}

/// The first deployment of all, which takes in files that are there from before.
#[tokio::test]
async fn killed_during_the_first_deployment_the_old_pair_is_left() -> Result<()> {
    let host = Host::new().await?;
    let (old, next) = (host.old.serial()?, certificate().issue()?);
    let lineage = host.renew(&next)?;
    let arguments = ["certs", "deploy", "--lineage", &lineage.to_string_lossy()];
    for place in ["after:stage", "after:keep", "after:link-cert", "after:link-key", "before:switch"] {
        let mut paused = Started::paused(&host.cluster, &arguments, place).await?;
        paused.signal(Signal::SIGKILL)?;
        paused.end().await?;
        host.assert_files(&old).context(place)?;
        host.sikorsky().restart().await.context(place)?;
        host.assert_in_use(&host.old).await.context(place)?;
    }
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&next).await?;
    host.finish().await
}

#[tokio::test]
async fn two_at_once_do_it_once_and_neither_stays_root() -> Result<()> {
    let host = Host::new().await?;
    let good = certificate().issue()?;
    let lineage = host.renew(&good)?;
    let arguments = ["certs", "deploy", "--lineage", &lineage.to_string_lossy()];
    let mut first = Started::paused(&host.cluster, &arguments, "after:keep").await?;
    // Whoever began it, it goes on as the owner of the files, with no way back: all four of its user ids.
    let status = fs::read_to_string(format!("/proc/{}/status", first.pid()?))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("no ids")?;
    let owner = fs::metadata(&host.places)?.uid().to_string();
    ensure!(ids.split_whitespace().all(|id| id == owner), "it is still {ids}");
    let mut second = Started::new(&host.cluster, &arguments)?;
    let descriptors = format!("/proc/{}/fd", second.pid()?);
    wait_until("the second one to have come to the lock", PATIENCE, || async {
        let open = fs::read_dir(&descriptors)?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        Ok(open.into_iter().any(|path| path.ends_with("certificates/lock")).then_some(()))
    })
    .await?;
    ensure!(!second.has_ended()?, "it did not wait");
    host.assert_in_use(&host.old).await?;
    first.signal(Signal::SIGCONT)?;
    let (first, second) = (first.end().await?.expect_code(0)?, second.end().await?.expect_code(0)?);
    ensure!(first.json["changed"] == true && second.json["changed"] == false, "{first:#?} {second:#?}");
    host.assert_in_use(&good).await?;
    host.finish().await
}

#[tokio::test]
async fn certificates_that_are_not_ours_are_left_alone() -> Result<()> {
    let host = Host::new().await?;
    let mut command = host.cluster.agent_command(&["certs", "deploy"]);
    command.env("RENEWED_LINEAGE", "/etc/letsencrypt/live/www.example.net");
    let output = command.output().await?;
    ensure!(output.status.success() && String::from_utf8(output.stdout)?.contains("nothing to do"));
    let run = agent(&host.cluster, &["certs", "deploy"]).await?.expect_code(2)?;
    ensure!(run.says("no certificate is named"), "{run:#?}");
    host.finish().await
}

#[tokio::test]
async fn check_says_what_expires_and_what_is_not_served() -> Result<()> {
    let host = Host::new().await?;
    for (days, level, code) in [(22, "well", 0), (15, "warning", 0), (5, "error", 1)] {
        let short = certificate().valid(-20 * DAY - days * 60, days * DAY + 600).issue()?;
        host.renew(&short)?;
        host.deploy().await?.expect_code(0)?;
        let run = host.check().await?.expect_code(code)?;
        ensure!(days == 22 || run.json["worst"] == level, "{days}: {run:#?}");
        let finding = host.finding("server").await?;
        ensure!(finding["level"] == level && finding["certificate"]["serial"] == short.serial()?, "{finding:#}");
        let finding = host.finding("subscription").await?;
        ensure!(finding["level"] == level, "{finding:#}");
    }
    let status = host.cluster.agent(&["status"]).await?.expect_code(0)?;
    ensure!(status.stdout.contains("expires in 5 days"), "{status:#?}");
    // Copied by hand, and nothing reloaded.
    let newer = certificate().issue()?;
    fs::write(host.places.join("certificate.pem"), newer.certificate_pem()?)?;
    fs::write(host.places.join("privkey.pem"), newer.key_pem()?)?;
    for what in ["file", "subscription"] {
        let finding = host.finding(what).await?;
        ensure!(finding["text"].to_string().contains("reload pending"), "{finding:#}");
    }
    host.check().await?.expect_code(1)?;
    // Deploying the very same does what was forgotten.
    host.renew(&newer)?;
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&newer).await?;
    host.check().await?.expect_code(0)?;
    host.finish().await
}

/// What the notes say "may need to change".
#[tokio::test]
async fn a_root_that_no_longer_verifies_is_noticed() -> Result<()> {
    let host = Host::new().await?;
    let finding = host.finding("root").await?;
    ensure!(finding["level"] == "well" && finding["what"] == "root stillebot test authority", "{finding:#}");
    let root = host.cluster.agent_configuration().with_file_name("root.pem");
    let right = fs::read(&root)?;
    fs::write(&root, Authority::named("the next root")?.root_pem()?)?;
    let finding = host.finding("server").await?;
    ensure!(
        finding["level"] == "error" && finding["text"].to_string().contains("which the root does not verify"),
        "{finding:#}"
    );
    fs::write(&root, right)?;
    host.finish().await
}

#[tokio::test]
async fn the_watchdog_speaks_of_certificates_until_they_are_well() -> Result<()> {
    let host = Host::new().await?;
    host.cluster.configure_agent(
        "\n[watch]\nchannel = \"scream.emergency\"\ninterval = \"100ms\"\nstall = \"3s\"\ncertificates = \"1s\"\n",
    )?;
    let foreign = Authority::named("somebody else")?.request(&NAMES).issue()?;
    host.renew(&foreign)?;
    host.deploy().await?.expect_code(1)?;
    let watch = Watch::start(&host.cluster).await?;
    watch.hear("gideon", &["deployment of", "of sikorsky in trouble", "does not lead to the root"]).await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    host.deploy().await?.expect_code(0)?;
    watch.hear("gideon", &["deployment of", "of sikorsky is well again"]).await?;
    // Its own session survives that, and it sees what is served from then on.
    let short = certificate().valid(-10, 3 * DAY - 600).issue()?;
    host.renew(&short)?;
    host.deploy().await?.expect_code(0)?;
    watch.hear("sikorsky", &["certificate (server) of sikorsky", "expires in 2 days"]).await?;
    watch.end().await?;
    let once = agent(&host.cluster, &["watch", "--once"]).await?.expect_code(1)?;
    ensure!(once.json["conditions"].to_string().contains("expires in 2 days"), "{once:#?}");
    host.finish().await
}

/// Years of watching outlast many certificates of its own.
#[tokio::test]
async fn the_agents_own_certificate_is_renewed_while_it_watches() -> Result<()> {
    let host = Host::new().await?;
    let own = |name: &str| host.cluster.agent_configuration().with_file_name(name).display().to_string();
    host.cluster.configure_agent(&format!(
        "\n[watch]\ninterval = \"100ms\"\nstall = \"3s\"\n[[certificate]]\nlineage = \"agent.example.net\"\n\
         use = \"agent\"\ncert = \"{}\"\nkey = \"{}\"\n",
        own("agent.pem"),
        own("agent.key")
    ))?;
    let watch = Watch::start(&host.cluster).await?;
    let renewed = Authority::shared().request(&["agent.example.net"]).role("stillebot_agent").issue()?;
    let lineage = host.live.join("agent.example.net");
    fs::create_dir(&lineage)?;
    fs::write(lineage.join("fullchain.pem"), renewed.certificate_pem()?)?;
    fs::write(lineage.join("privkey.pem"), renewed.key_pem()?)?;
    let run =
        agent(&host.cluster, &["certs", "deploy", "--lineage", &lineage.to_string_lossy()]).await?.expect_code(0)?;
    ensure!(run.json["proofs"].to_string().contains("logged in to sikorsky with it"), "{run:#?}");
    // Its sessions end, and the next ones are made with what is in the files now.
    let serial = openssl::bn::BigNum::from_hex_str(&renewed.serial()?)?.to_dec_str()?.to_string();
    let sikorsky = host.sikorsky();
    let end =
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'stillebot-agent'";
    ensure!(sikorsky.value::<i64>(DATABASE, end).await? > 0, "nobody watches");
    let question = format!(
        "select exists (select from pg_stat_ssl join pg_stat_activity using (pid)
                         where application_name = 'stillebot-agent' and client_serial = {serial})"
    );
    wait_until("the watch to use the new one", PATIENCE, || async {
        Ok(sikorsky.value::<bool>(DATABASE, &question).await?.then_some(()))
    })
    .await?;
    watch.end().await?;
    host.finish().await
}

/// When the way back fails, too, a person is told, and the watchdog; and what is left is still a pair.
#[tokio::test]
async fn what_cannot_be_taken_back_is_said_to_need_a_person() -> Result<()> {
    let host = Host::new().await?;
    for part in [" 28000 ", "could not connect to the publisher", " 42501 "] {
        host.cluster.expect_log(part);
    }
    // The peer does not let it in.
    let stranger = Authority::shared().request(&NAMES).role("nobody").issue()?;
    let lineage = host.renew(&stranger)?;
    let arguments = ["certs", "deploy", "--lineage", &lineage.to_string_lossy()];
    let mut paused = Started::paused(&host.cluster, &arguments, "before:undo").await?;
    let verb = "execute on function pg_reload_conf()";
    host.sikorsky().execute(DATABASE, &format!("revoke {verb} from stillebot_agent")).await?;
    paused.signal(Signal::SIGCONT)?;
    let run = paused.end().await?.expect_code(3)?;
    ensure!(run.says("did not connect to gideon") && run.says("the old certificate is not back"), "{run:#?}");
    host.assert_files(&host.old.serial()?)?;
    let run = host.check().await?.expect_code(1)?;
    ensure!(run.json.to_string().contains("certificate deployment"), "{run:#?}");
    // The next good one ends it, from wherever it was left.
    host.sikorsky().execute(DATABASE, &format!("grant {verb} to stillebot_agent")).await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    host.check().await?.expect_code(0)?;
    host.finish().await
}

/// A run that was killed when it had put its pair in force has not proven it: the next one can still go back.
#[tokio::test]
async fn what_a_killed_run_left_unproven_is_taken_back_if_it_proves_to_be_bad() -> Result<()> {
    let host = Host::new().await?;
    host.cluster.expect_log(" 28000 ");
    host.cluster.expect_log("could not connect to the publisher");
    let stranger = Authority::shared().request(&NAMES).role("nobody").issue()?;
    let lineage = host.renew(&stranger)?;
    let arguments = ["certs", "deploy", "--lineage", &lineage.to_string_lossy()];
    for place in ["after:switch", "after:reload", "before:undo"] {
        let mut paused = Started::paused(&host.cluster, &arguments, place).await?;
        paused.signal(Signal::SIGKILL)?;
        paused.end().await?;
        host.assert_files(&stranger.serial()?).context(place)?;
    }
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("did not connect to gideon") && run.says("the old certificate is back"), "{run:#?}");
    host.assert_in_use(&host.old).await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    host.deploy().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    ensure!(fs::read_dir(host.places.join(".certificate.pem"))?.count() == 3, "something is left over");
    host.finish().await
}

/// As public authorities are since 2026: the server's is renewed, the client's refused, and somebody told.
#[tokio::test]
async fn an_authority_that_issues_for_servers_only_still_renews_the_servers() -> Result<()> {
    let host = Host::new().await?;
    let client = certificate().issue()?;
    let clients = host.give_subscriptions_files_of_their_own(&client).await?;
    let only = certificate().servers_only().issue()?;
    host.renew(&only)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("not issued for a client") && run.says("client.pem was left as it is"), "{run:#?}");
    ensure!(run.says("docs/certificates.md") && run.json["proofs"].to_string().contains("presents it"), "{run:#?}");
    host.assert_files(&only.serial()?)?;
    ensure!(host.sikorsky().endpoint().presented_serial().await? == only.serial()?, "it is not served");
    ensure!(fs::read(clients.join("client.pem"))? == client.certificate_pem()?, "the client's was touched");
    ensure!(host.presented_to_gideon().await? == Some(client.serial()?), "it connects with another");
    let finding = host.finding("deployment of").await?;
    ensure!(
        finding["level"] == "error" && finding["text"].to_string().contains("not issued for a client"),
        "{finding:#}"
    );
    // So are those without a name for the role.
    host.renew(&certificate().role("").issue()?)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("has no common name") && run.says("client.pem was left as it is"), "{run:#?}");
    host.finish().await
}

/// It may have been away for weeks when its certificate comes.
#[tokio::test]
async fn a_subscription_whose_certificate_has_expired_connects_with_the_renewed_one() -> Result<()> {
    let host = Host::new().await?;
    for part in ["could not connect to the publisher", " 08P01 ", " 08006 ", " 28000 "] {
        host.cluster.expect_log(part);
    }
    let expired = certificate().valid(-40 * DAY, -60).issue()?;
    host.give_subscriptions_files_of_their_own(&expired).await?;
    let away = "select not exists (select from pg_stat_replication where application_name = 'multihome')";
    wait_until("the subscription to be kept away", PATIENCE, || async {
        Ok(host.cluster.node("gideon").value::<bool>(DATABASE, away).await?.then_some(()))
    })
    .await?;
    // Nobody is let in by that name either: not connected before is no excuse.
    host.renew(&certificate().role("nobody").issue()?)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("did not connect to gideon") && run.says("the old certificate is back"), "{run:#?}");
    let good = certificate().issue()?;
    host.renew(&good)?;
    let run = host.deploy().await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done" && run.json["proofs"].to_string().contains("connected with it"), "{run:#?}");
    host.assert_in_use(&good).await?;
    host.finish().await
}

#[tokio::test]
async fn what_nobody_could_be_asked_about_is_said_to_be_unproven() -> Result<()> {
    let host = Host::new().await?;
    for part in ["could not connect to the publisher", "could not receive data", " 57P01 ", "08006"] {
        host.cluster.expect_log(part);
    }
    host.cluster.node("gideon").stop(Shutdown::Fast).await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    let run = host.deploy().await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "unproven", "{run:#?}");
    ensure!(run.json["unproven"].to_string().contains("connects with it when it can"), "{run:#?}");
    ensure!(host.note()?["outcome"] == "unproven", "{:#}", host.note()?);
    host.cluster.node("gideon").start().await?;
    let finding = host.finding("deployment of").await?;
    ensure!(finding["level"] == "warning" && finding["text"].to_string().contains("is not proven"), "{finding:#}");
    // The next run proves it.
    host.assert_in_use(&good).await?;
    let run = host.deploy().await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done" && host.note()?["outcome"] == "deployed", "{run:#?}");
    host.finish().await
}

#[tokio::test]
async fn a_subscription_that_uses_other_files_is_noticed() -> Result<()> {
    let host = Host::new().await?;
    let tls = host.sikorsky().socket_directory().join("tls");
    host.connect_with(&tls.join("server-as-replicator.pem"), &tls.join("server-as-replicator.key")).await?;
    let good = certificate().issue()?;
    host.renew(&good)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(
        run.says("the sslcert of subscription multihome is") && run.says("the old certificate is back"),
        "{run:#?}"
    );
    host.assert_files(&host.old.serial()?)?;
    host.finish().await
}

/// Its name leads to an address where it does not listen, as behind a router that does not lead back.
#[tokio::test]
async fn a_server_that_its_name_does_not_lead_to_is_asked_over_loopback() -> Result<()> {
    let host = Host::new().await?;
    let path = host.cluster.agent_configuration();
    let text = fs::read_to_string(&path)?;
    let port = host.sikorsky().port();
    let place = format!("host        = \"127.0.0.1\"\nport        = {port}\n");
    ensure!(text.contains(&place), "{text}");
    fs::write(&path, text.replace(&place, &place.replace("127.0.0.1", "127.0.0.9")))?;
    let names = ["127.0.0.1", "127.0.0.9", "sikorsky.example.net"];
    for (round, proof) in [(1, "ms after the reload"), (2, "presents it already")] {
        let good = Authority::shared().request(&names).role("replicator").issue()?;
        if round == 1 {
            host.renew(&good)?;
        }
        let run = host.deploy().await?.expect_code(0)?;
        ensure!(run.json["proofs"].to_string().contains(proof), "{run:#?}");
        let served = host.sikorsky().endpoint().presented_serial().await?;
        ensure!(served == host.pair()?, "another one is served");
    }
    host.sikorsky().stop(Shutdown::Fast).await?;
    host.renew(&Authority::shared().request(&names).role("replicator").issue()?)?;
    let run = host.deploy().await?.expect_code(0)?;
    ensure!(run.json["proofs"].to_string().contains("is served from its next start"), "{run:#?}");
    host.sikorsky().start().await?;
    host.finish().await
}

/// What root may do to a directory, its owner may not.
#[tokio::test]
async fn with_two_owners_each_place_is_written_as_its_own() -> Result<()> {
    if !Uid::effective().is_root() {
        eprintln!("not proven: only root can give files to two users");
        return Ok(());
    }
    let host = Host::new().await?;
    let web = host.live.with_file_name("web");
    fs::create_dir(&web)?;
    let nobody = User::from_name("nobody")?.context("no nobody")?;
    chown(&web, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw()))?;
    host.cluster.configure_agent(&format!(
        "\n[[certificate]]\nlineage = \"{LINEAGE}\"\nuse = \"other\"\ncert = \"{web}/c.pem\"\nkey = \"{web}/k.pem\"\n\
         owner = \"nobody\"\n",
        web = web.display()
    ))?;
    let good = certificate().issue()?;
    let lineage = host.renew(&good)?;
    fs::set_permissions(&web, fs::Permissions::from_mode(0o500))?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("Permission denied") && run.says("nothing was changed"), "{run:#?}");
    ensure!(!web.join(".c.pem").exists(), "root has written there");
    fs::set_permissions(&web, fs::Permissions::from_mode(0o700))?;
    let arguments = ["certs", "deploy", "--lineage", &lineage.to_string_lossy()];
    let mut paused = Started::paused(&host.cluster, &arguments, "before:reload").await?;
    // Real, effective, saved: what talks to servers does not act as root.
    let status = fs::read_to_string(format!("/proc/{}/status", paused.pid()?))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("no ids")?;
    let effective = ids.split_whitespace().nth(1).context("no effective id")?;
    ensure!(effective == fs::metadata(&host.places)?.uid().to_string(), "it acts as {ids}");
    paused.signal(Signal::SIGCONT)?;
    paused.end().await?.expect_code(0)?;
    host.assert_in_use(&good).await?;
    for name in ["c.pem", "k.pem"] {
        ensure!(fs::metadata(web.join(name))?.uid() == nobody.uid.as_raw(), "{name} is another's");
    }
    // And all of it is taken back by whoever it belongs to.
    host.cluster.expect_log(" 28000 ");
    host.cluster.expect_log("could not connect to the publisher");
    host.renew(&Authority::shared().request(&NAMES).role("nobody").issue()?)?;
    let run = host.deploy().await?.expect_code(1)?;
    ensure!(run.says("the old certificate is back"), "{run:#?}");
    ensure!(fs::read(web.join("c.pem"))? == good.certificate_pem()?, "it is not back");
    host.assert_in_use(&good).await?;
    host.finish().await
}

/// Certbot's `name-0001`, made when it is asked for other names.
#[tokio::test]
async fn a_lineage_of_this_hosts_names_that_is_not_configured_is_no_strangers() -> Result<()> {
    let host = Host::new().await?;
    let deploy = |domains: &str| {
        let mut command = host.cluster.agent_command(&["certs", "deploy"]);
        command.env("RENEWED_LINEAGE", format!("/etc/letsencrypt/live/{LINEAGE}-0001")).env("RENEWED_DOMAINS", domains);
        command.output()
    };
    let output = deploy("www.example.net").await?;
    ensure!(output.status.success(), "{output:?}");
    let output = deploy("www.example.net 127.0.0.1").await?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && said.contains("is the configured lineage for"), "{said}");
    let finding = host.finding("deployment of").await?;
    ensure!(finding["level"] == "error" && finding["text"].to_string().contains("-0001"), "{finding:#}");
    let good = certificate().issue()?;
    host.renew(&good)?;
    host.deploy().await?.expect_code(0)?;
    host.assert_well().await?;
    host.finish().await
}

/// The blocks of commands of docs/certificates.md, line by line.
fn page() -> Vec<Vec<&'static str>> {
    let mut blocks: Vec<Vec<&str>> = Vec::new();
    let mut inside = false;
    for line in include_str!("../../../docs/certificates.md").lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
            if inside {
                blocks.push(Vec::new());
            }
        } else if let Some(block) = blocks.last_mut().filter(|_| inside) {
            block.push(line);
        }
    }
    blocks
}

#[tokio::test]
async fn the_commands_of_docs_certificates_md_make_a_pair() -> Result<()> {
    let cluster = Cluster::builder().bare().direct().start().await?;
    for part in [" 57P01 ", "is already active for PID", "is active for PID"] {
        cluster.expect_log(part);
    }
    let directory = cluster.agent_configuration().with_file_name("authority");
    fs::create_dir(&directory)?;
    let shell = |line: &str| -> Result<()> {
        let output = Command::new("sh").args(["-c", line]).current_dir(&directory).output()?;
        ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let blocks = page();
    let [authority, clients, replace] = &blocks[..] else {
        anyhow::bail!("docs/certificates.md has lost its commands")
    };
    for line in authority.iter().chain(clients) {
        shell(line)?;
    }
    // What goes where.
    let path = cluster.agent_configuration();
    let state = path.with_file_name("state");
    let mut text = format!("state = \"{}\"\n{}", state.display(), fs::read_to_string(&path)?);
    for name in ["pem", "key"] {
        fs::copy(directory.join(format!("stillebot_agent.{name}")), path.with_file_name(format!("agent.{name}")))?;
    }
    for node in cluster.nodes() {
        let data = fs::metadata(node.data_directory())?;
        let places = node.socket_directory().join("main");
        fs::create_dir(&places)?;
        chown(&places, Some(data.uid()), Some(data.gid()))?;
        for name in ["replicator.pem", "replicator.key"] {
            fs::copy(directory.join(name), places.join(name))?;
            fs::set_permissions(places.join(name), fs::Permissions::from_mode(0o600))?;
            chown(places.join(name), Some(data.uid()), Some(data.gid()))?;
        }
        // The superuser of the harness has its own authority.
        let trusted = places.join("clients.pem");
        fs::write(&trusted, [fs::read(directory.join("ca.pem"))?, Authority::shared().root_pem()?].concat())?;
        node.config(&[("ssl_ca_file", &trusted.to_string_lossy())]).await?;
        let tls = node.socket_directory().join("tls").display().to_string();
        for name in ["pem", "key"] {
            let before = format!("{tls}/server-as-replicator.{name}");
            ensure!(text.contains(&before), "no {before} in {text}");
            text = text.replace(&before, &places.join(format!("replicator.{name}")).to_string_lossy());
        }
    }
    let sikorsky = cluster.node("sikorsky");
    let places = sikorsky.socket_directory().join("main");
    let owner = User::from_uid(Uid::from_raw(fs::metadata(&places)?.uid()))?.context("who runs the servers?")?.name;
    text += &format!(
        "\n[[certificate]]\nlineage = \"replicator\"\nuse = \"replication\"\nnode = \"sikorsky\"\n\
         cert = \"{places}/replicator.pem\"\nkey = \"{places}/replicator.key\"\nroot = \"{places}/clients.pem\"\n\
         owner = \"{owner}\"\n",
        places = places.display()
    );
    fs::write(&path, text)?;

    let init = cluster.as_admin("init", &["--yes"]);
    agent(&cluster, &init.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(0)?;
    let issuers = "select count(*) from pg_stat_ssl join pg_stat_replication using (pid)
                    where issuer_dn = '/CN=stillebot clients' and client_dn = '/CN=replicator'";
    for node in cluster.nodes() {
        ensure!(node.value::<i64>(DATABASE, issuers).await? == 1, "{}: not with that certificate", node.name());
    }
    agent(&cluster, &["certs", "check"]).await?.expect_code(0)?;

    // The next one, years later.
    for line in clients.iter().filter(|line| line.contains("replicator.")) {
        shell(line)?;
    }
    let before = serial_at(cluster.node("gideon")).await?;
    for line in replace {
        match line.strip_prefix("stillebot-agent certs deploy --lineage ./") {
            Some(lineage) => {
                let lineage = directory.join(lineage);
                let run = agent(&cluster, &["certs", "deploy", "--lineage", &lineage.to_string_lossy()]).await?;
                ensure!(run.expect_code(0)?.json["proofs"].to_string().contains("connected with it"));
            }
            None => shell(line)?,
        }
    }
    ensure!(serial_at(cluster.node("gideon")).await? != before, "it connects with the old one");
    cluster.wait_replicated().await?;
    cluster.finish().await
}

/// The serial number that the peer's subscription has presented to a node.
async fn serial_at(node: &Server) -> Result<Option<String>> {
    let query = "select (select t.client_serial::text from pg_stat_replication w join pg_stat_ssl t using (pid)
                          where w.application_name = 'multihome' and w.state = 'streaming')";
    node.value(DATABASE, query).await
}
