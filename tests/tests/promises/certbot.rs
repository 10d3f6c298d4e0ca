//! Certificates as in life: an authority that speaks ACME (pebble), certbot, and its deploy hook, while both nodes are written.
//!
//! What the authority issues for, clients too or servers only, depends on its version, as in life on the year: either way the
//! servers' certificates are its, and the clients' are as far as it goes; else they are of the pair's own authority.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::unistd::{Uid, User};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Authority, Cluster, Port, Rows, Server, Workload, WorkloadOptions, wait_until};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::PATIENCE;
use crate::runs::agent;

/// A reconnection that meets the slot or the origin still in use is tried again after wal_retrieve_retry_interval, 500 ms here;
/// the rest is for a loaded machine.
const LONGEST_GAP: Duration = Duration::from_secs(5);
const NODES: [&str; 2] = ["sikorsky", "gideon"];

fn domain(node: &str) -> String {
    format!("{node}.example.net")
}

/// Where a node's certificate is.
fn places(node: &Server) -> PathBuf {
    node.socket_directory().join("main")
}

/// An authority of a test's own. All of it listens on loopback only; it asks its own name server, for which every name is here.
struct Pebble {
    directory: PathBuf,
    port: Port,
    management: Port,
    http: Port,
    _names: Port,
    _names_management: Port,
    _processes: Vec<Child>,
}

impl Pebble {
    async fn start(directory: PathBuf) -> Result<Self> {
        fs::create_dir(&directory)?;
        let identity = Authority::shared().request(&["localhost", "127.0.0.1"]).issue()?;
        let path = |name: &str| directory.join(name);
        fs::write(path("cert.pem"), identity.certificate_pem()?)?;
        fs::write(path("key.pem"), identity.key_pem()?)?;
        fs::write(path("trust.pem"), Authority::shared().root_pem()?)?;
        let (port, management, http) = (Port::take()?, Port::take()?, Port::take()?);
        let (names, names_management) = (Port::take()?, Port::take()?);
        let local = |port: &Port| format!("127.0.0.1:{}", port.number);
        let configuration = serde_json::json!({"pebble": {
            "listenAddress": local(&port), "managementListenAddress": local(&management),
            "certificate": path("cert.pem"), "privateKey": path("key.pem"),
            "httpPort": http.number, "tlsPort": http.number, "ocspResponderURL": "",
            "externalAccountBindingRequired": false}});
        fs::write(path("pebble.json"), configuration.to_string())?;
        let start = |program: &str, arguments: &[&str]| -> Result<Child> {
            let log = fs::File::create(path(&format!("{program}.log")))?;
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig=KILL", "--", program]).args(arguments);
            command.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_WFE_NONCEREJECT", "0");
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
            command.spawn().with_context(|| format!("{program}; run scripts/setup"))
        };
        let names_server = start(
            "pebble-challtestsrv",
            &[
                "-dns01",
                &local(&names),
                "-management",
                &local(&names_management),
                "-defaultIPv4",
                "127.0.0.1",
                "-defaultIPv6",
                "",
                "-http01",
                "",
                "-https01",
                "",
                "-tlsalpn01",
                "",
            ],
        )?;
        let configuration = path("pebble.json").to_string_lossy().into_owned();
        let authority =
            start("pebble", &["-config", &configuration, "-dnsserver", &local(&names), "-strict", "false"])?;
        let _processes = vec![names_server, authority];
        let pebble =
            Self { directory, port, management, http, _names: names, _names_management: names_management, _processes };
        wait_until("pebble to answer", PATIENCE, || async { pebble.root().await.map(Some) }).await?;
        Ok(pebble)
    }

    /// The root that it made for itself.
    async fn root(&self) -> Result<Vec<u8>> {
        let url = format!("https://localhost:{}/roots/0", self.management.number);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--max-time", "5", "--noproxy", "*", "--cacert"]);
        let output = curl.arg(self.directory.join("trust.pem")).arg(url).output().await.context("curl")?;
        ensure!(output.status.success(), "{output:?}");
        Ok(output.stdout)
    }

    /// Certbot, with everything of it in the test's directory; `path` is where it finds the agent.
    async fn certbot(&self, arguments: &[&str], path: &Path) -> Result<Output> {
        let directory = |name: &str| self.directory.join(name);
        let mut certbot = Command::new("certbot");
        certbot.args(arguments).args(["--non-interactive", "--config-dir"]).arg(directory("config"));
        certbot.arg("--work-dir").arg(directory("work")).arg("--logs-dir").arg(directory("logs"));
        certbot.env("REQUESTS_CA_BUNDLE", directory("trust.pem")).env("NO_PROXY", "*").stdin(Stdio::null());
        let search = std::env::var("PATH").unwrap_or_default();
        certbot.env("PATH", format!("{}:{search}", path.display()));
        let output = certbot.kill_on_drop(true).output().await.context("certbot; run scripts/setup")?;
        ensure!(output.status.success(), "{output:#?}");
        Ok(output)
    }

    async fn obtain(&self, domain: &str, path: &Path) -> Result<()> {
        let server = format!("https://localhost:{}/dir", self.port.number);
        let http = self.http.number.to_string();
        let standalone = ["certonly", "--standalone", "--http-01-address", "127.0.0.1", "--http-01-port", &http];
        let rest = ["--server", &server, "--agree-tos", "--register-unsafely-without-email", "--domain", domain];
        self.certbot(&[&standalone[..], &rest].concat(), path).await.map(drop)
    }

    fn lineage(&self, node: &str) -> PathBuf {
        self.directory.join("config/live").join(domain(node))
    }

    /// Whether `cert` lets clients in with what it issues: before 2.5 it put in a common name.
    fn issues_for_clients(&self, domain: &str) -> Result<bool> {
        let path = self.directory.join("config/live").join(domain).join("cert.pem");
        let certificate = openssl::x509::X509::from_pem(&fs::read(path)?)?;
        let common_name = certificate.subject_name().entries_by_nid(openssl::nid::Nid::COMMONNAME).next();
        Ok(common_name.is_some())
    }

    /// The serial number of the certificate that certbot has now.
    fn serial(&self, node: &str) -> Result<String> {
        let certificate = openssl::x509::X509::from_pem(&fs::read(self.lineage(node).join("cert.pem"))?)?;
        Ok(certificate.serial_number().to_bn()?.to_hex_str()?.to_string())
    }
}

/// Both hosts as in the notes: one pair each, the server's, and its subscription's if it is for clients; peers verify each other in
/// full, by name.
async fn furnish(cluster: &Cluster, root: &[u8], for_clients: bool) -> Result<()> {
    let path = cluster.agent_configuration();
    let mut text = fs::read_to_string(&path)?.replace("verify-full", "verify-ca");
    text.insert_str(0, &format!("state = \"{}\"\n", path.with_file_name("state").display()));
    let agent_root = path.with_file_name("root.pem");
    fs::write(&agent_root, [fs::read(&agent_root)?, root.to_vec()].concat())?;
    for node in cluster.nodes() {
        let data = fs::metadata(node.data_directory())?;
        let (uid, gid) = (data.uid(), data.gid());
        let owner = User::from_uid(Uid::from_raw(uid))?.context("who runs the servers?")?.name;
        let (places, name, domain) = (places(node), node.name(), domain(node.name()));
        fs::create_dir(&places)?;
        chown(&places, Some(uid), Some(gid))?;
        let names = ["127.0.0.1", &domain];
        let identity = Authority::shared().request(&names).role("replicator").issue()?;
        for (file, content) in [("certificate.pem", identity.certificate_pem()?), ("privkey.pem", identity.key_pem()?)]
        {
            fs::write(places.join(file), content)?;
            fs::set_permissions(places.join(file), fs::Permissions::from_mode(0o600))?;
            chown(places.join(file), Some(uid), Some(gid))?;
        }
        let trusted = node.socket_directory().join("tls/root.pem");
        fs::write(&trusted, [Authority::shared().root_pem()?, root.to_vec()].concat())?;
        // The names of hosts are roles to PostgreSQL only where it is told so.
        let rules = node.data_directory().join("pg_hba.conf");
        let rule = "hostssl stillebot replicator 127.0.0.1/32 cert map=peers\n";
        fs::write(&rules, format!("{rule}{}", fs::read_to_string(&rules)?))?;
        let map =
            "peers replicator replicator\npeers sikorsky.example.net replicator\npeers gideon.example.net replicator\n";
        let users = node.data_directory().join("pg_ident.conf");
        fs::write(&users, format!("{map}{}", fs::read_to_string(&users)?))?;
        let file = |name: &str| places.join(name).to_string_lossy().into_owned();
        let (cert, key) = (file("certificate.pem"), file("privkey.pem"));
        let uses = if for_clients { r#"["server", "replication"]"# } else { r#"["server"]"# };
        text += &format!(
            "\n[[certificate]]\nlineage = \"{domain}\"\nuse = {uses}\nnode = \"{name}\"\n\
             cert = \"{cert}\"\nkey = \"{key}\"\nowner = \"{owner}\"\n"
        );
        let entry = format!("active_name = \"{domain}\"\n\n[node.replication]\n");
        ensure!(text.contains(&entry), "no {entry} in {text}");
        text = text.replace(&entry, &format!("{entry}host = \"{domain}\"\n"));
        node.config(&[("ssl_cert_file", &cert), ("ssl_key_file", &key)]).await?;
    }
    for (node, peer) in [(0, 1), (1, 0)].map(|(node, peer)| (&cluster.nodes()[node], &cluster.nodes()[peer])) {
        let tls = if for_clients {
            let (places, root) = (places(node), node.socket_directory().join("tls/root.pem"));
            format!(
                "sslmode=verify-full sslrootcert={} sslcert={places}/certificate.pem sslkey={places}/privkey.pem",
                root.display(),
                places = places.display(),
            )
        } else {
            node.outgoing_tls("replicator")?
        };
        let statement = format!(
            "alter subscription multihome connection 'hostaddr=127.0.0.1 host={} port={} dbname={DATABASE} \
             user=replicator {tls} application_name=multihome'",
            domain(peer.name()),
            peer.port(),
        );
        node.execute(DATABASE, &statement).await?;
    }
    Ok(fs::write(path, text)?)
}

/// Looks, all the time, whether a node's peer streams from it, and keeps the longest time that it did not.
struct Lookout {
    stop: Arc<AtomicBool>,
    looks: BTreeMap<String, JoinHandle<Result<Duration>>>,
}

impl Lookout {
    async fn start(cluster: &Cluster) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut looks = BTreeMap::new();
        for node in cluster.nodes() {
            let session = node.superuser(DATABASE).await?;
            let stop = Arc::clone(&stop);
            let look = tokio::spawn(async move {
                let query = "select exists (select from pg_stat_replication where state = 'streaming')";
                let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    if session.query_one(query, &[]).await?.get(0) {
                        longest = longest.max(last.elapsed());
                        last = Instant::now();
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(longest.max(last.elapsed()))
            });
            looks.insert(node.name().to_owned(), look);
        }
        Ok(Self { stop, looks })
    }

    async fn end(self) -> Result<BTreeMap<String, Duration>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut longest = BTreeMap::new();
        for (node, look) in self.looks {
            longest.insert(node, look.await??);
        }
        Ok(longest)
    }
}

/// The serial number that a node's subscription has presented to its peer.
async fn presented(peer: &Server) -> Result<Option<String>> {
    let query = "select (select t.client_serial::text from pg_stat_replication w join pg_stat_ssl t using (pid)
                          where w.application_name = 'multihome' and w.state = 'streaming')";
    let decimal: Option<String> = peer.value(DATABASE, query).await?;
    decimal.map(|decimal| Ok(openssl::bn::BigNum::from_dec_str(&decimal)?.to_hex_str()?.to_string())).transpose()
}

async fn assert_in_use(cluster: &Cluster, pebble: &Pebble, for_clients: bool) -> Result<()> {
    for (node, peer) in [(0, 1), (1, 0)].map(|(node, peer)| (&cluster.nodes()[node], &cluster.nodes()[peer])) {
        let serial = pebble.serial(node.name())?;
        let served = node.endpoint().presented_serial().await?;
        ensure!(served == serial, "{} presents {served}, certbot has {serial}", node.name());
        let presented = presented(peer).await?;
        ensure!(!for_clients || presented == Some(serial), "{} presented another one to its peer", node.name());
        ensure!(presented.is_some(), "{} does not replicate from its peer", node.name());
    }
    Ok(())
}

#[tokio::test]
async fn certbot_renews_twice_under_load_and_nothing_is_lost() -> Result<()> {
    let cluster = Cluster::builder().direct().start().await?;
    cluster.expect_log(" 57P01 ");
    for busy in ["is already active for PID", "is active for PID"] {
        cluster.expect_log(busy);
    }
    let pebble = Pebble::start(cluster.agent_configuration().with_file_name("pebble")).await?;
    let bin = pebble.directory.join("bin");
    // A certificate of somebody else's, which the hook will leave alone.
    pebble.obtain("www.example.net", &bin).await?;
    let for_clients = pebble.issues_for_clients("www.example.net")?;
    furnish(&cluster, &pebble.root().await?, for_clients).await?;
    cluster.wait_replicated().await?;

    // The hook as it is shipped; what it calls is found where certbot's PATH says.
    fs::create_dir(&bin)?;
    let program = cluster.agent_command(&[]);
    let program = Path::new(program.as_std().get_program()).to_string_lossy().into_owned();
    let configuration = cluster.agent_configuration();
    let shim = format!("#!/bin/sh\nexec '{program}' --config '{}' \"$@\"\n", configuration.display());
    fs::write(bin.join("stillebot-agent"), shim)?;
    fs::set_permissions(bin.join("stillebot-agent"), fs::Permissions::from_mode(0o755))?;
    let hooks = pebble.directory.join("config/renewal-hooks/deploy");
    fs::create_dir_all(&hooks)?;
    fs::copy(stillebot_tests::postgres::workspace().join("agent/certbot/stillebot"), hooks.join("stillebot"))?;

    let options = WorkloadOptions { rows: Rows::PerClientAndNode, clients: 4, pause: Duration::from_millis(10) };
    let workload = Workload::start(&cluster, options);
    for node in 0..NODES.len() {
        workload.wait_writes(node, 20).await?;
    }
    let lookout = Lookout::start(&cluster).await?;
    for node in NODES {
        pebble.obtain(&domain(node), &bin).await?;
        // Certbot's hooks run at renewals; the first time it is a person.
        agent(&cluster, &["certs", "deploy", "--lineage", &pebble.lineage(node).to_string_lossy()])
            .await?
            .expect_code(0)?;
    }
    assert_in_use(&cluster, &pebble, for_clients).await?;
    for _ in 0..2 {
        let before = NODES.map(|node| pebble.serial(node));
        pebble.certbot(&["renew", "--force-renewal", "--no-random-sleep-on-renew"], &bin).await?;
        for (node, before) in NODES.iter().zip(before) {
            ensure!(pebble.serial(node)? != before?, "{node}: not renewed");
        }
        assert_in_use(&cluster, &pebble, for_clients).await?;
        for node in 0..NODES.len() {
            workload.wait_writes(node, 20).await?;
        }
    }
    let run = agent(&cluster, &["certs", "check"]).await?.expect_code(0)?;
    // Who it is that signs clients' certificates here, no entry says.
    let worst = if for_clients { "well" } else { "unknown" };
    ensure!(run.json["worst"] == worst, "{run:#?}");
    let gaps = lookout.end().await?;
    eprintln!("longest time without replication from: {gaps:?}");
    ensure!(gaps.values().all(|gap| *gap < LONGEST_GAP), "{gaps:?}");

    let report = workload.stop(PATIENCE).await?;
    ensure!(report.disconnected == 0 && report.unsaved.is_empty(), "{:?}", report.unsaved);
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    report.verify(&cluster).await?.ensure_clean()?;
    cluster.finish().await
}
