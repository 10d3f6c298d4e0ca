//! `certs deploy`: puts a renewed certificate where it is used, and proves that it is; and `certs check`.
//!
//! What is good enough is `certs.rs`'s to say, how files are replaced `deploy.rs`'s; here are the order of the steps
//! ([`STEPS`]), the proofs, and the way back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::{Gid, Group, Uid, User, setgroups, setresgid, setresuid};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::watch::own_node;
use super::{Context, Reply, pause, render, table};
use crate::certs::{self, Facts, Pair, Wanted};
use crate::cli::PauseAt;
use crate::config::{Certificate, Config, Node, TlsMode, Use};
use crate::crew::{CONNECT_BOUND, LOOK_BOUND};
use crate::deploy::{Files, Place};
use crate::failure::{Failure, Kind};
use crate::inspect::{self, Level};
use crate::node::{Connector, Handshake, NodeError, Session};
use crate::renewal::{Ledger, Note, Outcome};
use crate::sql;
use crate::stop::Signals;

/// The steps of a deployment, each done for all places before the next one. Up to `switch` nothing that anybody reads has
/// changed, and a run that was cut off is simply made again.
///
/// | step         | what                                               | why there                                | undo |
/// | ------------ | -------------------------------------------------- | ---------------------------------------- | ---- |
/// | `check`      | everything that can be known before                | while we may still read the lineage      | -    |
/// | `give-up`    | root's rights, where one owner has all places      | after the last file that needs them      | -    |
/// | `stage`      | the new pair is written beside the old one         | before the old one is touched: disks fill | removed |
/// | `keep`       | files from before the first deployment: a version  | so that there is a way back              | none needed: it reads the same |
/// | `link-cert`  | their path becomes a link to it                    | reads the same before and after          | none needed |
/// | `link-key`   | and the key's                                      | in any order                             | none needed |
/// | `switch`     | the new version is in force                        | one rename, when all else is there       | the old version is |
/// | `reload`     | servers present the new certificate                | -                                        | reload, and present the old one |
/// | `reconnect`  | subscriptions connect with it                      | a server that did not take it needs no interruption of these | reconnect |
/// | `prune`      | versions before the last are removed               | when nobody goes back to them            | -    |
pub const STEPS: [&str; 10] =
    ["check", "give-up", "stage", "keep", "link-cert", "link-key", "switch", "reload", "reconnect", "prune"];

/// Where certbot keeps certificates, for lineages that are given by name only.
const LIVE: &str = "/etc/letsencrypt/live";
/// How long one TLS handshake may take.
const HANDSHAKE_BOUND: Duration = Duration::from_secs(5);
/// How long a server may take to present another certificate after a reload; and to be able to reload at all.
const RELOAD_BOUND: Duration = Duration::from_secs(10);
/// How long a subscription may take to connect anew: a worker that could not is tried again after
/// wal_retrieve_retry_interval, 5 s unless configured.
const RECONNECT_BOUND: Duration = Duration::from_secs(20);
/// Between two looks at either.
const PAUSE: Duration = Duration::from_millis(20);

/// What to do where the answer is the same.
const TRY_AGAIN: &str = "mend that and run `certs deploy` again; nothing else will before the next renewal";

/// Options of `certs deploy`.
pub struct Order<'a> {
    /// A directory or a name; none: what certbot says.
    pub lineage: Option<&'a Path>,
    /// For tests.
    pub pause_at: Option<&'a PauseAt>,
}

/// One place of the configuration that the certificate goes to.
struct Site<'a> {
    entry: &'a Certificate,
    node: Option<&'a Node>,
    place: Place,
    /// What is there, if it is a pair.
    before: Option<Pair>,
    /// And as files.
    files: Files,
    /// It is the new one.
    same: bool,
    /// The version to go back to, once the new one is in force.
    old: Option<u32>,
    new: Option<u32>,
}

impl Site<'_> {
    fn serves(&self, purpose: Use) -> bool {
        self.entry.uses.contains(&purpose)
    }
}

/// A deployment under way.
struct Deployment<'a> {
    config: &'a Config,
    signals: &'a Signals,
    pause_at: Option<&'a PauseAt>,
    pair: Pair,
    facts: Facts,
    sites: Vec<Site<'a>>,
    /// Made while we could read what belongs to it.
    connector: Result<Connector, Failure>,
    /// The same, which believes every server, and tells none a password.
    credulous: Result<Connector, Failure>,
    /// What came out, a line each.
    proofs: Vec<String>,
    /// How long subscriptions were not connected: subscriber, publisher, milliseconds.
    gaps: Vec<Value>,
    /// A subscription was told to connect anew.
    reconnected: bool,
    /// On the way back, which no signal ends.
    undoing: bool,
}

/// Puts the renewed certificate of one lineage into its places.
pub async fn deploy(config: &Config, signals: &Signals, order: &Order<'_>) -> Result<Reply, Failure> {
    let directory = lineage(order.lineage)?;
    let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let entries: Vec<&Certificate> = config.certificates.iter().filter(|entry| entry.lineage == name).collect();
    if entries.is_empty() {
        let text = format!("no [[certificate]] of the configuration has lineage {name:?}: nothing to do");
        return Ok(Reply::done(text, json!({"command": "certs deploy", "outcome": "not ours", "lineage": name})));
    }
    let began = now();
    let mut ledger = Ledger::begin(&config.state, &name, began).await.map_err(|error| {
        Failure::new(Kind::Undone, format!("{error}; nothing was changed"))
            .hint("run it as root, as certbot does, or name another directory as `state` in the configuration")
    })?;
    let mut there = crate::renewal::read(&config.state, &name).and_then(|note| note.certificate);
    let result = run(config, signals, order, &directory, &entries, &mut there).await;
    let outcome = match &result {
        Ok(_) => Outcome::Deployed,
        Err(failure) => Outcome::Failed { why: failure.message.clone() },
    };
    if let Err(error) = ledger.write(&Note { lineage: name, began, outcome, certificate: there }) {
        tracing::warn!(%error, "how it ended could not be written down");
    }
    result
}

async fn run(
    config: &Config,
    signals: &Signals,
    order: &Order<'_>,
    directory: &Path,
    entries: &[&Certificate],
    there: &mut Option<Facts>,
) -> Result<Reply, Failure> {
    pause(order.pause_at, "check", false);
    let pair = read_lineage(directory).map_err(unchanged)?;
    let facts = pair.chain.facts();
    let sites = entries.iter().map(|entry| survey(config, entry, &pair)).collect::<Result<Vec<_>, Failure>>()?;
    *there = sites.iter().find_map(|site| site.before.as_ref()).map(|pair| pair.chain.facts());
    let (connector, credulous) = (Connector::new(config), Connector::new(&credulous(config)));
    pause(order.pause_at, "check", true);
    let mut deployment = Deployment {
        config,
        signals,
        pause_at: order.pause_at,
        pair,
        facts,
        sites,
        connector,
        credulous,
        proofs: Vec::new(),
        gaps: Vec::new(),
        reconnected: false,
        undoing: false,
    };
    deployment.step("give-up", give_up_root).map_err(unchanged)?;
    if let Err(error) = deployment.put() {
        return Err(deployment.undo(error).await);
    }
    if let Err(error) = deployment.prove().await {
        return Err(deployment.undo(error).await);
    }
    *there = Some(deployment.facts.clone());
    deployment.finish()
}

fn lineage(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let renewed = || std::env::var_os("RENEWED_LINEAGE").filter(|path| !path.is_empty()).map(PathBuf::from);
    match given {
        Some(name) if name.components().count() == 1 && name.is_relative() => Ok(Path::new(LIVE).join(name)),
        Some(path) => Ok(path.to_owned()),
        None => renewed().ok_or_else(|| {
            Failure::new(Kind::Usage, "no certificate is named").hint(
                "certbot names it to its deploy hooks in RENEWED_LINEAGE; by hand, name its directory with --lineage",
            )
        }),
    }
}

fn read_lineage(directory: &Path) -> Result<Pair, String> {
    let read = |name: &str| {
        let path = directory.join(name);
        std::fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    Pair::read(read("fullchain.pem")?, read("privkey.pem")?).map_err(|flaw| format!("{}: {flaw}", directory.display()))
}

fn unchanged(error: String) -> Failure {
    Failure::new(Kind::Undone, format!("{error}; nothing was changed")).hint(TRY_AGAIN)
}

/// The configuration of a connection that verifies nothing.
fn credulous(config: &Config) -> Config {
    let mut config = config.clone();
    if config.tls.mode != TlsMode::Disable {
        config.tls.mode = TlsMode::Require;
    }
    (config.tls.root, config.passfile) = (None, None);
    config
}

/// Everything about one place that can be known before anything is done.
fn survey<'a>(config: &'a Config, entry: &'a Certificate, pair: &Pair) -> Result<Site<'a>, Failure> {
    let node = match &entry.node {
        Some(name) => config.node(name),
        None => own_node(config),
    };
    let needs_node = entry.uses.contains(&Use::Server) || entry.uses.contains(&Use::Replication);
    if needs_node && node.is_none() {
        return Err(Failure::new(
            Kind::Configuration,
            format!("certificate.node of {}: must be given: no node is named as this host", entry.lineage),
        ));
    }
    let root = entry.root.as_ref().or(config.tls.root.as_ref()).ok_or_else(|| {
        Failure::new(
            Kind::Configuration,
            format!("certificate.root of {}: must be given, as tls.root is not", entry.lineage),
        )
        .hint("it is the file that PostgreSQL's clients have as sslrootcert")
    })?;
    let survey = || -> Result<Site<'a>, String> {
        let root = std::fs::read(root).map_err(|error| format!("cannot read {}: {error}", root.display()))?;
        let names = match (&entry.names, node) {
            (Some(names), _) => names.clone(),
            (None, Some(node)) if entry.uses.contains(&Use::Server) => certs::names_of(config, node),
            _ => Vec::new(),
        };
        let (uid, gid) = owner(entry)?;
        let place = Place::open(&entry.cert, &entry.key, uid, gid, entry.mode)?;
        let files = place.files()?;
        place.current()?;
        let before = match files.clone() {
            [Some(cert), Some(key)] => Pair::read(cert, key).ok(),
            _ => None,
        };
        let wanted = Wanted { root, uses: entry.uses.clone(), names };
        pair.judge(&wanted, before.as_ref(), now())?;
        let same = before.as_ref().is_some_and(|before| before.is(pair));
        Ok(Site { entry, node, place, before, files, same, old: None, new: None })
    };
    survey().map_err(unchanged)
}

fn owner(entry: &Certificate) -> Result<(Option<Uid>, Option<Gid>), String> {
    let user = match &entry.owner {
        None => None,
        Some(name) => {
            let user = User::from_name(name).ok().flatten();
            Some(user.ok_or_else(|| format!("there is no user {name} to own {}", entry.cert.display()))?)
        }
    };
    let group = match &entry.group {
        None => user.as_ref().map(|user| user.gid),
        Some(name) => {
            let group = Group::from_name(name).ok().flatten();
            Some(group.ok_or_else(|| format!("there is no group {name} to own {}", entry.cert.display()))?.gid)
        }
    };
    match user {
        Some(user) if !Uid::effective().is_root() && user.uid != Uid::effective() => Err(format!(
            "only root can give {} to {}: run it as root, or as {}",
            entry.cert.display(),
            user.name,
            user.name
        )),
        user => Ok((user.map(|user| user.uid), group)),
    }
}

/// Root's rights are for reading the lineage. Where all places belong to one user, who may well be the one to fear, everything
/// else is done as that user, for good.
fn give_up_root(sites: &mut [Site<'_>]) -> Result<(), String> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let owners: BTreeSet<Option<u32>> = sites.iter().map(|site| site.place.owner().0.map(Uid::as_raw)).collect();
    let [Some(uid)] = owners.into_iter().collect::<Vec<_>>()[..] else { return Ok(()) };
    let uid = Uid::from_raw(uid);
    for site in sites.iter() {
        if uid.is_root() || site.place.directory_owner()? != uid {
            tracing::debug!(directory = %site.place.path().display(), "staying root: it is not the owner's");
            return Ok(());
        }
    }
    let give_up = || -> nix::Result<()> {
        let own = User::from_uid(uid)?.map(|user| user.gid);
        let groups: Vec<Gid> = own.into_iter().chain(sites.iter().filter_map(|site| site.place.owner().1)).collect();
        let Some(gid) = groups.first().copied() else { return Ok(()) };
        setgroups(&groups)?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)
    };
    give_up().map_err(|error| format!("cannot become the owner of the files: {error}"))
}

impl<'a> Deployment<'a> {
    fn step(
        &mut self,
        step: &'static str,
        work: impl FnOnce(&mut [Site<'a>]) -> Result<(), String>,
    ) -> Result<(), String> {
        debug_assert!(STEPS.contains(&step));
        pause(self.pause_at, step, false);
        work(&mut self.sites)?;
        pause(self.pause_at, step, true);
        Ok(())
    }

    /// From the first file to the one rename that matters.
    fn put(&mut self) -> Result<(), String> {
        let files: Files = [Some(self.pair.cert.clone()), Some(self.pair.key.clone())];
        self.step("stage", |sites| {
            for site in sites.iter_mut().filter(|site| !site.same) {
                site.new = Some(site.place.stage(&files)?);
            }
            Ok(())
        })?;
        self.step("keep", |sites| {
            for site in sites.iter_mut().filter(|site| !site.same && !site.place.is_linked().unwrap_or(false)) {
                let version = site.place.stage(&site.files)?;
                site.place.switch(version)?;
            }
            Ok(())
        })?;
        for (which, step) in [(0, "link-cert"), (1, "link-key")] {
            self.step(step, |sites| {
                sites.iter().filter(|site| !site.same).try_for_each(|site| site.place.link(which))
            })?;
        }
        self.step("switch", |sites| {
            for site in sites.iter_mut() {
                let Some(new) = site.new else { continue };
                site.old = site.place.current()?;
                site.place.switch(new)?;
            }
            Ok(())
        })
    }

    /// The nodes whose servers, or subscriptions, use one of the places.
    fn nodes(&self, purpose: Use) -> Vec<&'a Node> {
        let mut nodes: Vec<&Node> = Vec::new();
        for site in self.sites.iter().filter(|site| site.serves(purpose)) {
            nodes.extend(site.node.filter(|node| nodes.iter().all(|other| other.name != node.name)));
        }
        nodes
    }

    async fn prove(&mut self) -> Result<(), String> {
        pause(self.pause_at, "reload", false);
        let facts = self.facts.clone();
        for node in self.nodes(Use::Server) {
            let proof = self.serve(node, &facts).await?;
            self.proofs.push(format!("{}: {proof}", node.name));
        }
        pause(self.pause_at, "reload", true);
        pause(self.pause_at, "reconnect", false);
        if self.sites.iter().any(|site| site.serves(Use::Agent)) {
            self.connector = Connector::new(self.config);
            let proof = self.log_in().await?;
            self.proofs.push(format!("agent: {proof}"));
        }
        for node in self.nodes(Use::Replication) {
            for proof in self.reconnect(node, &facts).await? {
                self.proofs.push(format!("{}: {proof}", node.name));
            }
        }
        pause(self.pause_at, "reconnect", true);
        Ok(())
    }

    fn check_signals(&self) -> Result<(), String> {
        match self.signals.received() {
            Some(signal) if !self.undoing => Err(format!("stopped by {signal}")),
            _ => Ok(()),
        }
    }

    fn connector(&self) -> Result<&Connector, String> {
        self.connector.as_ref().map_err(|failure| failure.message.clone())
    }

    /// Has a server present that certificate, if it runs.
    async fn serve(&self, node: &Node, facts: &Facts) -> Result<String, String> {
        let connector = self.connector()?;
        let look = || async { connector.handshake(node, HANDSHAKE_BOUND).await.map_err(|error| error.to_string()) };
        let other = match look().await? {
            Handshake::NotRunning => return Ok("the server is not running: it is served from its next start".into()),
            Handshake::Served(chain) if chain.facts().serial == facts.serial => {
                return Ok("the server presents it already".into());
            }
            Handshake::Served(chain) => chain.facts().serial,
        };
        let began = Instant::now();
        self.reload(node).await?;
        loop {
            self.check_signals()?;
            match look().await {
                Ok(Handshake::Served(chain)) if chain.facts().serial == facts.serial => {
                    return Ok(format!("the server presents it, {} ms after the reload", began.elapsed().as_millis()));
                }
                _ if began.elapsed() < RELOAD_BOUND => sleep(PAUSE).await,
                Ok(Handshake::NotRunning) => {
                    return Ok("the server has stopped meanwhile: it is served from its next start".into());
                }
                Ok(Handshake::Served(_)) => {
                    return Err(format!(
                        "{}: {} after the reload, the server still presents the certificate with serial {other}: see its \
                         log, and whether ssl_cert_file is the configured file",
                        node.name,
                        humantime::format_duration(RELOAD_BOUND)
                    ));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Through a session; where the very certificate that is to be replaced is in the way of one, without verifying it: all
    /// that is asked is to read files anew, of this host's own server, and what it presents is proven afterwards. No password is
    /// told to whom we do not know.
    async fn reload(&self, node: &Node) -> Result<(), String> {
        let began = Instant::now();
        let session = loop {
            self.check_signals()?;
            match self.session(node).await {
                Ok(session) => break session,
                // It is starting, perhaps.
                Err(_) if began.elapsed() < RELOAD_BOUND / 2 => sleep(PAUSE * 10).await,
                Err(error) => return Err(format!("{error}; so it cannot be reloaded")),
            }
        };
        let row = session
            .row(sql::RELOAD, &[], LOOK_BOUND)
            .await
            .map_err(|error| format!("{error}: grant execute on function pg_reload_conf() to {}", self.config.user))?;
        if row.get(0) { Ok(()) } else { Err(format!("{}: the server could not be told to reload", node.name)) }
    }

    async fn session(&self, node: &Node) -> Result<Session, String> {
        let first = match &self.connector {
            Ok(connector) => match connector.connect(node, CONNECT_BOUND).await {
                Ok(session) => return Ok(session),
                Err(error) => error.to_string(),
            },
            Err(failure) => failure.message.clone(),
        };
        match &self.credulous {
            // The first error is the one to tell.
            Ok(connector) => connector.connect(node, CONNECT_BOUND).await.map_err(|_| first),
            Err(_) => Err(first),
        }
    }

    /// The agent itself, to whichever node answers.
    async fn log_in(&self) -> Result<String, String> {
        let connector = self.connector()?;
        for node in self.config.nodes.iter().filter(|node| !node.is_local()) {
            let session = match connector.connect(node, CONNECT_BOUND).await {
                Ok(session) => session,
                Err(error) if error.answered => return Err(error.to_string()),
                Err(error) => {
                    tracing::debug!(%error, "proves nothing");
                    continue;
                }
            };
            let row = session.row(sql::CERT_OWN, &[], LOOK_BOUND).await.map_err(|error| error.to_string())?;
            let serial = row.get::<_, Option<String>>("serial").and_then(|text| certs::serial_of_decimal(&text));
            return match serial {
                Some(serial) if serial == self.facts.serial => Ok(format!("logged in to {} with it", node.name)),
                Some(_) => Err(format!("{}: logged in with another certificate: is tls.cert the file?", node.name)),
                None => Ok(format!("{} asks for no certificate", node.name)),
            };
        }
        Ok("no node to log in to".into())
    }

    /// Has all subscriptions of a node connect with that certificate, if they are connected.
    async fn reconnect(&mut self, node: &Node, facts: &Facts) -> Result<Vec<String>, String> {
        let connector = self.connector()?;
        if let Ok(Handshake::NotRunning) = connector.handshake(node, HANDSHAKE_BOUND).await {
            return Ok(vec!["not running: its subscriptions connect with it from its next start on".into()]);
        }
        let session = connector.connect(node, CONNECT_BOUND).await.map_err(|error| error.to_string())?;
        let mut proofs = Vec::new();
        for source in self.config.peers(&node.name) {
            let subscription = self.config.subscription_to(&source.name);
            let peer = self.connector()?.connect(source, CONNECT_BOUND).await.ok();
            let (proof, gap) = self.reconnect_one(&session, peer.as_ref(), source, &subscription, facts).await?;
            if let Some(gap) = gap {
                self.gaps.push(json!({"from": source.name, "to": node.name, "ms": gap.as_millis() as u64}));
            }
            proofs.push(format!("subscription {subscription} from {}: {proof}", source.name));
        }
        Ok(proofs)
    }

    async fn reconnect_one(
        &mut self,
        session: &Session,
        peer: Option<&Session>,
        source: &Node,
        subscription: &str,
        facts: &Facts,
    ) -> Result<(String, Option<Duration>), String> {
        let told = |error: NodeError| error.to_string();
        let before = worker(session, subscription).await.map_err(told)?;
        let Some(before) = before else { return Ok(("there is none".into(), None)) };
        if !(before.enabled && before.connected) {
            return Ok(("not connected before: it connects with it when it can".into(), None));
        }
        let slot = before.slot.as_deref().unwrap_or_default();
        let sender = match peer {
            Some(peer) => sender(peer, slot).await.map_err(told)?,
            None => None,
        };
        if sender.as_ref().is_some_and(|sender| sender.serial.as_ref() == Some(&facts.serial)) {
            return Ok(("connected with it already".into(), None));
        }
        let old_sender = sender.map(|sender| sender.pid);
        let began = Instant::now();
        self.reconnected = true;
        session.rows(sql::RECONNECT, &[&subscription], LOOK_BOUND).await.map_err(|error| {
            format!("{error}: grant execute on function multihome.reconnect(text) to {}", self.config.user)
        })?;
        let mut presented = None;
        loop {
            self.check_signals()?;
            let after = worker(session, subscription).await.map_err(told)?;
            let anew = after.is_some_and(|after| after.connected && after.pid.is_some() && after.pid != before.pid);
            let seen = match peer {
                _ if !anew => None,
                // What it presented, only the peer can tell.
                None => {
                    return Ok(("connected anew; its peer cannot be asked with what".into(), Some(began.elapsed())));
                }
                Some(peer) => sender_anew(peer, slot, old_sender).await.map_err(told)?,
            };
            if let Some(sender) = seen {
                match sender.serial {
                    Some(serial) if serial == facts.serial => {
                        let gap = began.elapsed();
                        return Ok((format!("connected with it after {} ms", gap.as_millis()), Some(gap)));
                    }
                    None => {
                        let gap = began.elapsed();
                        return Ok((
                            format!("connected anew after {} ms; its peer asks for no certificate", gap.as_millis()),
                            Some(gap),
                        ));
                    }
                    Some(serial) => presented = Some(serial),
                }
            }
            if began.elapsed() >= RECONNECT_BOUND || presented.is_some() {
                let what = match presented {
                    Some(serial) => {
                        format!(
                            "connected to {} with another certificate, serial {serial}: see its sslcert",
                            source.name
                        )
                    }
                    None => format!(
                        "did not connect to {} within {}: see the node's log",
                        source.name,
                        humantime::format_duration(RECONNECT_BOUND)
                    ),
                };
                return Err(format!("subscription {subscription} on {}: {what}", session.node));
            }
            sleep(PAUSE).await;
        }
    }

    /// The old pair is back, and in use again.
    async fn undo(&mut self, error: String) -> Failure {
        self.undoing = true;
        pause(self.pause_at, "undo", false);
        let undone = self.go_back().await;
        pause(self.pause_at, "undo", true);
        match undone {
            Ok(false) => unchanged(error),
            Ok(true) => Failure::new(Kind::Undone, format!("{error}; the old certificate is back")).hint(TRY_AGAIN),
            Err(also) => {
                Failure::new(Kind::NeedsPerson, format!("{error}; and the old certificate is not back: {also}"))
                    .hint("see what `certs check` says, and run `certs deploy` again when it is mended")
            }
        }
    }

    /// True if there was anything to go back from.
    async fn go_back(&mut self) -> Result<bool, String> {
        let mut back = false;
        let mut errors: Vec<String> = Vec::new();
        for site in &self.sites {
            if let Some(old) = site.old {
                back = true;
                errors.extend(site.place.switch(old).err());
            }
            // What is in force stays; the new one nobody reads any more.
            if let Err(error) = site.place.prune(&[]) {
                tracing::warn!("{error}; what is left there is in nobody's way");
            }
        }
        if back {
            let old = |site: &Site<'_>| site.before.as_ref().map(|pair| pair.chain.facts());
            let olds: Vec<(Option<String>, Facts, bool, bool)> = self
                .sites
                .iter()
                .filter(|site| site.old.is_some())
                .filter_map(|site| {
                    let name = site.node.map(|node| node.name.clone());
                    Some((name, old(site)?, site.serves(Use::Server), site.serves(Use::Replication)))
                })
                .collect();
            for (name, facts, serves, replicates) in olds {
                let Some(node) = name.and_then(|name| self.config.node(&name)) else { continue };
                if serves {
                    errors.extend(self.serve(node, &facts).await.err());
                }
                if replicates && self.reconnected {
                    errors.extend(self.reconnect(node, &facts).await.err());
                }
            }
        }
        if errors.is_empty() { Ok(back) } else { Err(errors.join("; ")) }
    }

    fn finish(mut self) -> Result<Reply, Failure> {
        let pruned = self.step("prune", |sites| {
            sites.iter().try_for_each(|site| {
                let keep: Vec<u32> = site.old.into_iter().chain(site.new).collect();
                if keep.is_empty() { Ok(()) } else { site.place.prune(&keep) }
            })
        });
        if let Err(error) = pruned {
            tracing::warn!("{error}; what is left there is in nobody's way");
        }
        let places: Vec<Value> = self
            .sites
            .iter()
            .map(|site| json!({"cert": site.entry.cert, "key": site.entry.key, "changed": !site.same}))
            .collect();
        let changed = self.sites.iter().any(|site| !site.same);
        let word = if changed { "deployed" } else { "in place already" };
        let mut text = format!(
            "{} {word}: serial {}, until {}, signed by {}",
            self.facts.names.join(", "),
            self.facts.serial,
            certs::date(self.facts.not_after),
            self.facts.issuer
        );
        for proof in &self.proofs {
            text.push_str("\n  ");
            text.push_str(proof);
        }
        let json = json!({"command": "certs deploy", "outcome": "done", "changed": changed, "certificate": self.facts,
            "places": places, "proofs": self.proofs, "gaps": self.gaps});
        Ok(Reply::done(text, json))
    }
}

/// A subscription's apply worker.
struct Worker {
    enabled: bool,
    connected: bool,
    slot: Option<String>,
    pid: Option<i32>,
}

async fn worker(session: &Session, subscription: &str) -> Result<Option<Worker>, NodeError> {
    let rows = session.rows(sql::CERT_WORKER, &[&subscription], LOOK_BOUND).await?;
    Ok(rows.first().map(|row| Worker {
        enabled: row.get("enabled"),
        connected: row.get("connected"),
        slot: row.get("slot"),
        pid: row.get("pid"),
    }))
}

/// Who serves a slot's reader, and what that one presented.
struct Sender {
    pid: i32,
    streaming: bool,
    serial: Option<String>,
}

async fn sender(session: &Session, slot: &str) -> Result<Option<Sender>, NodeError> {
    let rows = session.rows(sql::CERT_SENDER, &[&slot], LOOK_BOUND).await?;
    Ok(rows.first().map(|row| Sender {
        pid: row.get("pid"),
        streaming: row.get::<_, Option<bool>>("streaming").unwrap_or(false),
        serial: row.get::<_, Option<String>>("serial").and_then(|text| certs::serial_of_decimal(&text)),
    }))
}

/// Only one that is at work, and not the one from before.
async fn sender_anew(session: &Session, slot: &str, before: Option<i32>) -> Result<Option<Sender>, NodeError> {
    let found = sender(session, slot).await?;
    Ok(found.filter(|sender| sender.streaming && Some(sender.pid) != before))
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// `certs check`: every certificate in use, as file and as served.
pub async fn check(context: &Context) -> Reply {
    let findings = inspect::findings(context).await;
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Well);
    let mut lines = table(&["node", "certificate", "state", "until", "names", "signed by", "serial"]);
    for finding in &findings {
        let facts = finding.certificate.as_ref();
        let dash = |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".into());
        lines.add_row(vec![
            finding.node.clone(),
            finding.what.clone(),
            if finding.text.is_empty() { finding.level.word().into() } else { finding.text.clone() },
            dash(facts.map(|facts| certs::date(facts.not_after))),
            dash(facts.map(|facts| facts.names.join(", "))),
            dash(facts.map(|facts| facts.issuer.clone())),
            dash(facts.map(|facts| facts.serial.clone())),
        ]);
    }
    let verdict = match worst {
        Level::Well => "all is well",
        Level::Unknown => "what can be seen is well",
        Level::Warning => "nothing is wrong yet",
        Level::Error => "not all is well",
    };
    let json = json!({"command": "certs check", "outcome": "done", "worst": worst, "certificates": findings});
    let kind = (worst == Level::Error).then_some(Kind::Undone);
    Reply { text: format!("{}\n{verdict}", render(&lines)), json, kind }
}
