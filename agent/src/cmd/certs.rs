//! `certs deploy`: puts a renewed certificate where it is used, and proves that it is; and `certs check`.
//!
//! What is good enough is `certs.rs`'s to say, how files are replaced `deploy.rs`'s; here are the order of the steps
//! ([`STEPS`]), the proofs, and the way back.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::{Gid, Group, Uid, User, getgroups, setegid, seteuid, setgroups, setresgid, setresuid};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::watch::own_node;
use super::{Context, Reply, pause, render, table};
use crate::certs::{self, Facts, Flaw, Pair, Wanted};
use crate::cli::PauseAt;
use crate::config::{Certificate, Config, Node, TlsMode, Use};
use crate::conninfo::Conninfo;
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
/// | `give-up`    | root's rights: for good where one owner has all places, else for each place and the proofs | after the last file that needs them | - |
/// | `stage`      | the new pair is written beside the old one         | before the old one is touched: disks fill | removed |
/// | `keep`       | files from before the first deployment: a version  | so that there is a way back              | none needed: it reads the same |
/// | `link-cert`  | their path becomes a link to it                    | reads the same before and after          | none needed |
/// | `link-key`   | and the key's                                      | in any order                             | none needed |
/// | `switch`     | the way back is noted, the new version is in force | one rename, when all else is there       | the old version is |
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

/// Where the authority of certificates for clients is described.
const CLIENTS: &str = "public authorities no longer issue for clients: give clients certificates of an authority of your own, or \
                       passwords, see docs/certificates.md; and files of their own, so that the server's can be renewed";
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
    /// The version to go back to, of a run that was cut off before it had proven what is there.
    back: Option<u32>,
    /// Who does the work on its files, if not this process as it is.
    worker: Option<(Uid, Vec<Gid>)>,
    /// The version to go back to, once the new one is in force.
    old: Option<u32>,
    new: Option<u32>,
}

impl Site<'_> {
    fn serves(&self, purpose: Use) -> bool {
        self.entry.uses.contains(&purpose)
    }

    /// Does something to its files, as their owner: who can change the directory meanwhile has no more rights than that.
    fn at<T>(&self, work: impl FnOnce(&Place) -> Result<T, String>) -> Result<T, String> {
        let _lesser = self.worker.as_ref().map(Lesser::become_user).transpose()?;
        work(&self.place)
    }
}

/// While it lives, root acts with the rights of another user. All of this process does: it has one thread that does anything.
struct Lesser {
    groups: Vec<Gid>,
}

impl Lesser {
    fn become_user((uid, groups): &(Uid, Vec<Gid>)) -> Result<Self, String> {
        let lower = || -> nix::Result<Self> {
            let lesser = Self { groups: getgroups()? };
            setgroups(groups)?;
            if let Some(gid) = groups.first() {
                setegid(*gid)?;
            }
            seteuid(*uid)?;
            Ok(lesser)
        };
        lower().map_err(|error| format!("cannot act as the owner of the files: {error}"))
    }
}

impl Drop for Lesser {
    fn drop(&mut self) {
        let raise = || {
            seteuid(Uid::from_raw(0)).and_then(|()| setegid(Gid::from_raw(0))).and_then(|()| setgroups(&self.groups))
        };
        if let Err(error) = raise() {
            tracing::warn!(%error, "cannot act as root again");
        }
    }
}

/// What became of one subscription, or of the agent.
enum Proof {
    /// It uses the certificate.
    Seen(String),
    /// Whether it does, nobody could say.
    Open(String),
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
    /// Those of them that prove nothing.
    unproven: Vec<String>,
    /// Places of clients that were left as they are, each with the reason.
    refused: Vec<String>,
    /// Subscriptions, by node, that were connected at the beginning.
    connected: BTreeSet<(String, String)>,
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
    if entries.is_empty()
        && order.lineage.is_none()
        && let Some((entry, failure)) = passed_over(config, &name, &renewed_domains())
    {
        let mut ledger = begin(config, &entry.lineage, now()).await?;
        let there = crate::renewal::read(&config.state, &entry.lineage).and_then(|note| note.certificate);
        let outcome = Outcome::Failed { why: failure.message.clone() };
        note(&mut ledger, Note { lineage: entry.lineage.clone(), began: now(), outcome, certificate: there });
        return Err(failure);
    }
    if entries.is_empty() {
        let text = format!("no [[certificate]] of the configuration has lineage {name:?}: nothing to do");
        return Ok(Reply::done(text, json!({"command": "certs deploy", "outcome": "not ours", "lineage": name})));
    }
    let began = now();
    let mut ledger = begin(config, &name, began).await?;
    let mut there = crate::renewal::read(&config.state, &name).and_then(|note| note.certificate);
    let result = run(config, signals, order, &directory, &entries, &mut there).await;
    let outcome = match &result {
        Ok((_, unproven)) if unproven.is_empty() => Outcome::Deployed,
        Ok((_, unproven)) => Outcome::Unproven { why: unproven.join("; ") },
        Err(failure) => Outcome::Failed { why: failure.message.clone() },
    };
    note(&mut ledger, Note { lineage: name, began, outcome, certificate: there });
    result.map(|(reply, _)| reply)
}

async fn begin(config: &Config, lineage: &str, began: i64) -> Result<Ledger, Failure> {
    Ledger::begin(&config.state, lineage, began).await.map_err(|error| {
        Failure::new(Kind::Undone, format!("{error}; nothing was changed"))
            .hint("run it as root, as certbot does, or name another directory as `state` in the configuration")
    })
}

fn note(ledger: &mut Ledger, note: Note) {
    if let Err(error) = ledger.write(&note) {
        tracing::warn!(%error, "how it ended could not be written down");
    }
}

/// Certbot makes a second lineage, with a number behind its name, when it is asked for other names; the one that the
/// configuration names is renewed no more. Such a lineage is not somebody else's: it is for a server of this host.
fn passed_over<'a>(config: &'a Config, name: &str, domains: &[String]) -> Option<(&'a Certificate, Failure)> {
    let own = own_node(config).map(|node| node.name.as_str());
    let entry = config.certificates.iter().filter(|entry| entry.uses.contains(&Use::Server)).find(|entry| {
        let node = entry.node.as_deref().or(own);
        let here = node.is_some() && own.map_or_else(|| entry.cert.exists(), |own| node == Some(own));
        let names = || node.and_then(|node| config.node(node)).map(|node| certs::names_of(config, node));
        let names = entry.names.clone().or_else(names).unwrap_or_default();
        here && certs::uncovered(domains, &names).len() < names.len()
    })?;
    let failure = Failure::new(
        Kind::Undone,
        format!(
            "lineage {name:?} was renewed for {}, which {:?} is the configured lineage for, so the server's certificate \
             is not renewed; nothing was changed",
            domains.join(", "),
            entry.lineage
        ),
    );
    let hint =
        format!("name lineage {name:?} in that [[certificate]], or delete one of the two: see `certbot certificates`");
    Some((entry, failure.hint(hint)))
}

fn renewed_domains() -> Vec<String> {
    let domains = std::env::var("RENEWED_DOMAINS").unwrap_or_default();
    domains.split_whitespace().map(str::to_owned).collect()
}

async fn run(
    config: &Config,
    signals: &Signals,
    order: &Order<'_>,
    directory: &Path,
    entries: &[&Certificate],
    there: &mut Option<Facts>,
) -> Result<(Reply, Vec<String>), Failure> {
    pause(order.pause_at, "check", false);
    let pair = read_lineage(directory).map_err(unchanged)?;
    let facts = pair.chain.facts();
    let (mut sites, mut refused) = (Vec::new(), Vec::new());
    for entry in entries {
        match survey(config, entry, &pair)? {
            Ok(site) => sites.push(site),
            // The others may well take it: what is no client's certificate any more must not run out on a server.
            Err(text) => refused.push(format!("{text}; {} was left as it is", entry.cert.display())),
        }
    }
    if sites.is_empty() {
        return Err(unchanged(refused.join("; ")).hint(CLIENTS));
    }
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
        unproven: Vec::new(),
        refused,
        connected: BTreeSet::new(),
        gaps: Vec::new(),
        reconnected: false,
        undoing: false,
    };
    deployment.step("give-up", give_up_root).map_err(unchanged)?;
    if let Err(error) = deployment.put() {
        return Err(deployment.undo(error).await);
    }
    // Files are read, and changed no more: what comes from servers is not root's business.
    let lesser = deployment.sites.iter().find_map(|site| site.worker.as_ref()).map(Lesser::become_user);
    let proven = match lesser.transpose() {
        Ok(_lesser) => deployment.prove().await,
        Err(error) => Err(error),
    };
    if let Err(error) = proven {
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

/// Everything about one place that can be known before anything is done. The inner error: it is a client's, and only for servers
/// the certificate is good enough.
fn survey<'a>(config: &'a Config, entry: &'a Certificate, pair: &Pair) -> Result<Result<Site<'a>, String>, Failure> {
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
    let survey = || -> Result<Result<Site<'a>, String>, String> {
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
        let pair_of = |files: Files| match files {
            [Some(cert), Some(key)] => Pair::read(cert, key).ok(),
            _ => None,
        };
        let mut before = pair_of(files.clone());
        let same = before.as_ref().is_some_and(|before| before.is(pair));
        let back = match place.back()? {
            Some(version) => {
                // What is there was never proven; what was in force before it is what there is to compare with and go back to.
                let good = pair_of(place.files_of(version)?);
                let known = good.is_some();
                before = good.or(before);
                known.then_some(version)
            }
            None => None,
        };
        // Not of this host's agent, but what the peers' subscriptions have.
        let peers_root = match config.replication.mode {
            TlsMode::Disable | TlsMode::Require => None,
            _ => config.replication.root.as_ref().and_then(|root| std::fs::read(root).ok()),
        };
        let wanted = Wanted { root, peers_root, uses: entry.uses.clone(), names };
        match pair.judge(&wanted, before.as_ref(), now()) {
            Err(Flaw::ForServersOnly(text)) => return Ok(Err(text)),
            other => other.map_err(|flaw| flaw.text().to_owned())?,
        }
        Ok(Ok(Site { entry, node, place, before, files, same, back, worker: None, old: None, new: None }))
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
/// else is done as that user, for good; otherwise the work on each place is done as its owner. What is root's own, root does.
fn give_up_root(sites: &mut [Site<'_>]) -> Result<(), String> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    for site in sites.iter_mut() {
        let (Some(uid), gid) = site.place.owner() else { continue };
        if uid.is_root() {
            continue;
        }
        if site.place.directory_owner()? != uid {
            tracing::info!(directory = %site.place.path().display(), "staying root there: the directory is not the owner's");
            continue;
        }
        let own = User::from_uid(uid).ok().flatten().map(|user| user.gid);
        site.worker = Some((uid, own.into_iter().chain(gid).collect()));
    }
    let workers: Vec<&(Uid, Vec<Gid>)> = sites.iter().filter_map(|site| site.worker.as_ref()).collect();
    let [(uid, _), ..] = workers[..] else { return Ok(()) };
    let uid = *uid;
    if workers.len() < sites.len() || workers.iter().any(|(other, _)| *other != uid) {
        tracing::info!("root's rights are kept, and used between the steps only: the places have more than one owner");
        return Ok(());
    }
    let groups: Vec<Gid> = workers.iter().flat_map(|(_, groups)| groups.iter().copied()).collect();
    let give_up = || -> nix::Result<()> {
        let Some(gid) = groups.first().copied() else { return Ok(()) };
        setgroups(&groups)?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)
    };
    give_up().map_err(|error| format!("cannot become the owner of the files: {error}"))?;
    for site in sites {
        site.worker = None;
    }
    Ok(())
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
                site.new = Some(site.at(|place| place.stage(&files))?);
            }
            Ok(())
        })?;
        self.step("keep", |sites| {
            sites.iter().filter(|site| !site.same && !site.place.is_linked().unwrap_or(false)).try_for_each(|site| {
                site.at(|place| {
                    let version = place.stage(&site.files)?;
                    place.switch(version)
                })
            })
        })?;
        for (which, step) in [(0, "link-cert"), (1, "link-key")] {
            self.step(step, |sites| {
                sites.iter().filter(|site| !site.same).try_for_each(|site| site.at(|place| place.link(which)))
            })?;
        }
        self.step("switch", |sites| {
            for site in sites.iter_mut() {
                let Some(new) = site.new else {
                    site.old = site.back;
                    continue;
                };
                site.old = site.back.or(site.place.current()?);
                site.at(|place| {
                    site.old.map_or(Ok(()), |old| place.remember(old))?;
                    place.switch(new)
                })?;
            }
            Ok(())
        })?;
        if self.sites.iter().any(|site| site.serves(Use::Agent)) {
            self.connector = Connector::new(self.config);
        }
        Ok(())
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
            let proof = self.log_in().await?;
            self.keep("agent", proof);
        }
        for node in self.nodes(Use::Replication) {
            for proof in self.reconnect(node, &facts).await? {
                self.keep(&node.name, proof);
            }
        }
        pause(self.pause_at, "reconnect", true);
        Ok(())
    }

    fn keep(&mut self, whose: &str, proof: Proof) {
        let (Proof::Seen(text) | Proof::Open(text)) = &proof;
        let line = format!("{whose}: {text}");
        if matches!(proof, Proof::Open(_)) {
            self.unproven.push(line.clone());
        }
        self.proofs.push(line);
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

    /// What the server of this host presents, and how it is reached: as everybody does, or, where that way does not lead back to
    /// this host, over loopback.
    async fn look(&self, node: &Node) -> Result<(Node, Handshake), String> {
        let connector = self.connector()?;
        let first = connector.handshake(node, HANDSHAKE_BOUND).await;
        if let Ok(Handshake::Served(chain)) = first {
            return Ok((node.clone(), Handshake::Served(chain)));
        }
        let mut ports = vec![node.port];
        ports.extend(node.replication.port.filter(|port| *port != node.port));
        for port in &ports {
            for loopback in ["127.0.0.1", "::1"] {
                let near = Node { through: Some(loopback.into()), port: *port, ..node.clone() };
                match connector.handshake(&near, HANDSHAKE_BOUND).await {
                    Ok(Handshake::Served(chain)) => return Ok((near, Handshake::Served(chain))),
                    other => tracing::debug!(loopback, port, error = ?other.err(), "not there"),
                }
            }
        }
        match first.map_err(|error| error.to_string())? {
            // Refused is what a firewall says, too.
            Handshake::NotRunning if ports.iter().any(|port| has_socket(*port)) => Err(format!(
                "{}: the server runs, and is reached neither as {} nor over loopback: so what it presents cannot be seen",
                node.name, node.host
            )),
            other => Ok((node.clone(), other)),
        }
    }

    /// Has a server present that certificate, if it runs.
    async fn serve(&self, node: &Node, facts: &Facts) -> Result<String, String> {
        let (node, first) = self.look(node).await?;
        let (node, connector) = (&node, self.connector()?);
        let look = || async { connector.handshake(node, HANDSHAKE_BOUND).await.map_err(|error| error.to_string()) };
        let other = match first {
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
    async fn log_in(&self) -> Result<Proof, String> {
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
                Some(serial) if serial == self.facts.serial => {
                    Ok(Proof::Seen(format!("logged in to {} with it", node.name)))
                }
                Some(_) => Err(format!("{}: logged in with another certificate: is tls.cert the file?", node.name)),
                None => Ok(Proof::Seen(format!("{} asks for no certificate", node.name))),
            };
        }
        Ok(Proof::Open("no node to log in to".into()))
    }

    /// Has all subscriptions of a node connect with that certificate.
    async fn reconnect(&mut self, node: &Node, facts: &Facts) -> Result<Vec<Proof>, String> {
        let (near, seen) = self.look(node).await?;
        if matches!(seen, Handshake::NotRunning) {
            let text = "not running: its subscriptions connect with it from its next start on";
            return Ok(vec![Proof::Seen(text.into())]);
        }
        let session = self.connector()?.connect(&near, CONNECT_BOUND).await.map_err(|error| error.to_string())?;
        if !self.undoing {
            self.compare_paths(node, &session).await?;
        }
        let mut proofs = Vec::new();
        for source in self.config.peers(&node.name) {
            let subscription = self.config.subscription_to(&source.name);
            let peer = self.connector()?.connect(source, CONNECT_BOUND).await;
            let (proof, gap) = self.reconnect_one(&session, peer, source, &subscription, facts).await?;
            if let Some(gap) = gap {
                self.gaps.push(json!({"from": source.name, "to": node.name, "ms": gap.as_millis() as u64}));
            }
            let tell = |text: String| format!("subscription {subscription} from {}: {text}", source.name);
            proofs.push(match proof {
                Proof::Seen(text) => Proof::Seen(tell(text)),
                Proof::Open(text) => Proof::Open(tell(text)),
            });
        }
        Ok(proofs)
    }

    /// A subscription that reads other files would not notice anything of this.
    async fn compare_paths(&self, node: &Node, session: &Session) -> Result<(), String> {
        let sites = self.sites.iter().filter(|site| site.serves(Use::Replication));
        let places: Vec<&Path> = sites
            .filter(|site| site.node.is_some_and(|of| of.name == node.name))
            .map(|site| site.entry.cert.as_path())
            .collect();
        let ours: Vec<String> =
            self.config.peers(&node.name).map(|source| self.config.subscription_to(&source.name)).collect();
        let rows = session.rows(sql::SURVEY_CONNECTIONS, &[], LOOK_BOUND).await.map_err(|error| error.to_string())?;
        for row in rows {
            let (subscription, conninfo): (String, String) = (row.get("subscription"), row.get("conninfo"));
            let conninfo = Conninfo::parse(&conninfo).unwrap_or_default();
            let path = conninfo.get("sslcert").unwrap_or_default();
            if ours.contains(&subscription) && !places.iter().any(|place| is_same_path(place, Path::new(path))) {
                let place = places.first().map(|place| place.display().to_string()).unwrap_or_default();
                let path = if path.is_empty() { "none" } else { path };
                return Err(format!(
                    "{}: the sslcert of subscription {subscription} is {path}, not {place}: mend it with `set-connection`, \
                     or the [[certificate]]",
                    node.name
                ));
            }
        }
        Ok(())
    }

    async fn reconnect_one(
        &mut self,
        session: &Session,
        peer: Result<Session, NodeError>,
        source: &Node,
        subscription: &str,
        facts: &Facts,
    ) -> Result<(Proof, Option<Duration>), String> {
        let told = |error: NodeError| error.to_string();
        let before = worker(session, subscription).await.map_err(told)?;
        let Some(before) = before else { return Ok((Proof::Seen("there is none".into()), None)) };
        if !before.enabled {
            return Ok((Proof::Open("disabled: it connects with it when it is enabled".into()), None));
        }
        let slot = before.slot.as_deref().unwrap_or_default();
        let sender = match &peer {
            Ok(peer) => sender(peer, slot).await.map_err(told)?,
            Err(_) => None,
        };
        if sender.as_ref().is_some_and(|sender| sender.serial.as_ref() == Some(&facts.serial)) {
            return Ok((Proof::Seen("connected with it already".into()), None));
        }
        let whose = (session.node.clone(), subscription.to_owned());
        let expected = if self.undoing {
            let resumed = self.sites.iter().any(|site| site.back.is_some());
            resumed || self.connected.contains(&whose)
        } else {
            if before.connected {
                self.connected.insert(whose);
            }
            true
        };
        let old_sender = sender.map(|sender| sender.pid);
        let began = Instant::now();
        self.reconnected = true;
        session.rows(sql::RECONNECT, &[&subscription], LOOK_BOUND).await.map_err(|error| {
            format!("{error}: grant execute on function multihome.reconnect(text) to {}", self.config.user)
        })?;
        if !expected {
            return Ok((Proof::Open("not connected, as before".into()), None));
        }
        // What was not connected before has no reason to be now, but for the certificate.
        if let Err(error) = &peer
            && !before.connected
            && !error.answered
        {
            return Ok((Proof::Open(format!("{}: it connects with it when it can", error.message)), None));
        }
        let mut presented = None;
        loop {
            self.check_signals()?;
            let after = worker(session, subscription).await.map_err(told)?;
            let failed = after.as_ref().is_some_and(|after| after.apply_errors > before.apply_errors);
            if !before.connected && failed {
                let text = "it connects with it, and stops for another reason: see `conflicts list`";
                return Ok((Proof::Seen(text.into()), None));
            }
            let anew = after.is_some_and(|after| after.connected && after.pid.is_some() && after.pid != before.pid);
            let seen = match &peer {
                _ if !anew => None,
                // What it presented, only the peer can tell.
                Err(error) => {
                    let text = format!("connected anew; with what, its peer cannot be asked: {}", error.message);
                    return Ok((Proof::Open(text), Some(began.elapsed())));
                }
                Ok(peer) => sender_anew(peer, slot, old_sender).await.map_err(told)?,
            };
            if let Some(sender) = seen {
                let gap = began.elapsed();
                match sender.serial {
                    Some(serial) if serial == facts.serial => {
                        return Ok((Proof::Seen(format!("connected with it after {} ms", gap.as_millis())), Some(gap)));
                    }
                    None => {
                        let text =
                            format!("connected anew after {} ms; its peer asks for no certificate", gap.as_millis());
                        return Ok((Proof::Seen(text), Some(gap)));
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
                errors.extend(site.at(|place| place.switch(old).and_then(|()| place.forget())).err());
            }
            // The new one nobody reads any more, unless it is still in force. What else is there may be somebody's way back.
            if let Some(Err(error)) = site.new.map(|new| site.at(|place| place.discard(new))) {
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
                if replicates && (self.reconnected || self.sites.iter().any(|site| site.back.is_some())) {
                    errors.extend(self.reconnect(node, &facts).await.err());
                }
            }
        }
        if errors.is_empty() { Ok(back) } else { Err(errors.join("; ")) }
    }

    fn finish(mut self) -> Result<(Reply, Vec<String>), Failure> {
        let pruned = self.step("prune", |sites| {
            sites.iter().try_for_each(|site| {
                let keep: Vec<u32> = site.old.into_iter().chain(site.new).collect();
                let tidy = |place: &Place| place.forget().and_then(|()| place.prune(&keep));
                if keep.is_empty() { Ok(()) } else { site.at(tidy) }
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
        if !self.unproven.is_empty() {
            text.push_str("\nnot all of it is proven: see above");
        }
        let outcome = if self.unproven.is_empty() { "done" } else { "unproven" };
        let json = json!({"command": "certs deploy", "outcome": outcome, "changed": changed, "certificate": self.facts,
            "places": places, "proofs": self.proofs, "unproven": self.unproven, "gaps": self.gaps});
        if self.refused.is_empty() {
            return Ok((Reply::done(text, json), self.unproven));
        }
        let refused = self.refused.join("; ");
        let mut failure =
            Failure::new(Kind::Undone, format!("{refused}; the other places have it")).hint(CLIENTS).detail(text);
        failure.report.extend(
            json.as_object()
                .into_iter()
                .flatten()
                .filter(|(key, _)| *key != "outcome")
                .map(|(key, value)| (key.clone(), value.clone())),
        );
        Err(failure)
    }
}

/// Whether a server of that port has a socket on this host, where its packages and itself put them.
fn has_socket(port: u16) -> bool {
    let path = |folder: &str| format!("{folder}/.s.PGSQL.{port}");
    ["/run/postgresql", "/var/run/postgresql", "/tmp"].iter().any(|folder| UnixStream::connect(path(folder)).is_ok())
}

/// The directories may be written in two ways.
fn is_same_path(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    one == other || real(one).is_some_and(|one| real(other) == Some(one))
}

/// A subscription's apply worker.
struct Worker {
    enabled: bool,
    connected: bool,
    slot: Option<String>,
    pid: Option<i32>,
    /// How often it has stopped because of what it was to apply: it was connected, then.
    apply_errors: i64,
}

async fn worker(session: &Session, subscription: &str) -> Result<Option<Worker>, NodeError> {
    let rows = session.rows(sql::CERT_WORKER, &[&subscription], LOOK_BOUND).await?;
    Ok(rows.first().map(|row| Worker {
        enabled: row.get("enabled"),
        connected: row.get("connected"),
        slot: row.get("slot"),
        pid: row.get("pid"),
        apply_errors: row.get("apply_errors"),
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
