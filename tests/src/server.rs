//! One PostgreSQL server: made, started, stopped, killed, copied, removed.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, OpenOptions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{sys::signal, unistd::Pid};
use tokio::time::sleep;
use tokio_postgres::Client;

use crate::{
    authority::{Authority, Identity},
    endpoint::{Endpoint, Listener},
    log_check::{self, Expected, LOG_LINE_PREFIX},
    postgres::{self, Installation},
    process,
    scratch::{self, Port, Scratch},
    wait::{PATIENCE, wait_until},
};

/// How often processes and files are looked at while a server starts or stops.
const GLANCE: Duration = Duration::from_millis(5);

/// A server with a data directory, a port and certificates of its own. Stopped and removed on drop.
///
/// End a test with [`Server::finish`], which looks into the log; a server dropped without it prints the log's tail.
pub struct Server {
    name: String,
    installation: &'static Installation,
    authority: &'static Authority,
    settings: Mutex<BTreeMap<String, String>>,
    /// While it runs, as far as we know.
    postmaster: Mutex<Option<Child>>,
    /// Allowed in this server's log.
    own_expected: Expected,
    /// Allowed in the logs of all servers of a cluster.
    shared_expected: Expected,
    finished: bool,
    /// Does not end with this process.
    lasting: bool,
    /// No longer ours to end.
    left: bool,
    port: Port,
    // Last, because the directory goes last.
    directory: Scratch,
}

/// How to end a server (`pg_ctl stop -m`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shutdown {
    /// Sessions are ended, everything is written.
    Fast,
    /// Nothing is written; the next start recovers.
    Immediate,
}

/// What a base backup is to become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Backup {
    /// A server of its own, as if restored after a disaster.
    Restored,
    /// A hot standby that follows the original.
    Standby,
}

/// What a new server is to be like.
pub struct ServerBuilder {
    name: String,
    preload: bool,
    lasting: bool,
    settings: BTreeMap<String, String>,
    names: Vec<String>,
    authority: &'static Authority,
    expected: Expected,
    installation: Option<&'static Installation>,
}

impl ServerBuilder {
    /// Another PostgreSQL than the one under test.
    pub fn installation(mut self, installation: &'static Installation) -> Self {
        self.installation = Some(installation);
        self
    }

    /// Leaves the extension's library out of shared_preload_libraries.
    pub fn without_stillebot(mut self) -> Self {
        self.preload = false;
        self
    }

    /// A line of postgresql.conf; wins over the harness's own.
    pub fn config(mut self, key: &str, value: impl Into<String>) -> Self {
        self.settings.insert(key.to_owned(), value.into());
        self
    }

    /// Another name or address that the server's certificate is good for.
    pub fn also_named(mut self, name: &str) -> Self {
        self.names.push(name.to_owned());
        self
    }

    /// Who signs the server's certificate and those of its clients.
    pub fn authority(mut self, authority: &'static Authority) -> Self {
        self.authority = authority;
        self
    }

    /// The server goes on when this process ends, if it is let go of with [`Server::leave_running`].
    pub fn lasting(mut self) -> Self {
        self.lasting = true;
        self
    }

    /// Shares a list of allowed log lines with other servers.
    pub(crate) fn shared_expected(mut self, expected: &Expected) -> Self {
        self.expected = expected.clone();
        self
    }

    /// Makes the data directory.
    pub fn init(self) -> Result<Server> {
        let server = self.frame()?;
        copy_template(server.installation, &server.data_directory())?;
        server.furnish()?;
        Ok(server)
    }

    /// Makes the data directory and starts the server.
    pub async fn start(self) -> Result<Server> {
        let server = self.init()?;
        server.start().await?;
        Ok(server)
    }

    /// All but the data directory.
    fn frame(self) -> Result<Server> {
        let installation = self.installation.map_or_else(Installation::get, Ok)?;
        let directory = Scratch::new(&self.name)?;
        installation.server_user.own(directory.path())?;
        let mut settings = BTreeMap::new();
        let mut set = |key: &str, value: &str| settings.insert(key.to_owned(), value.to_owned());
        set("listen_addresses", "127.0.0.1");
        set("unix_socket_directories", &directory.path().to_string_lossy());
        set("ssl", "on");
        set("ssl_ca_file", &directory.path().join("tls/root.pem").to_string_lossy());
        set("ssl_cert_file", &directory.path().join("tls/server.pem").to_string_lossy());
        set("ssl_key_file", &directory.path().join("tls/server.key").to_string_lossy());
        set("fsync", "off");
        set("wal_level", "logical");
        set("track_commit_timestamp", "on");
        set("log_line_prefix", LOG_LINE_PREFIX);
        set("log_timezone", "UTC");
        set("timezone", "UTC");
        set("max_connections", "200");
        set("max_worker_processes", "32");
        set("max_logical_replication_workers", "16");
        set("max_wal_senders", "32");
        set("max_replication_slots", "32");
        set("max_prepared_transactions", "20");
        set("shared_buffers", "32MB");
        set("wal_retrieve_retry_interval", "500ms");
        // In the data directory, where it goes with the rest, instead of /dev/shm, where a killed server leaves it.
        set("dynamic_shared_memory_type", "mmap");
        if self.preload {
            set("shared_preload_libraries", "stillebot");
            set("stillebot.node", &self.name);
        }
        settings.extend(self.settings);
        let port = Port::take()?;
        let mut names = vec![self.name.clone()];
        names.extend(self.names);
        let server = Server {
            name: self.name,
            installation,
            authority: self.authority,
            settings: Mutex::new(settings),
            postmaster: Mutex::new(None),
            own_expected: Expected::default(),
            shared_expected: self.expected,
            finished: false,
            lasting: self.lasting,
            left: false,
            port,
            directory,
        };
        let tls = server.directory.path().join("tls");
        fs::create_dir(&tls)?;
        server.install_certificate(&self.authority.server(&names)?)?;
        fs::write(tls.join("root.pem"), self.authority.root_pem()?)?;
        Ok(server)
    }
}

impl Server {
    /// A server of that name, to be described further.
    pub fn builder(name: &str) -> ServerBuilder {
        ServerBuilder {
            name: name.to_owned(),
            preload: true,
            lasting: false,
            settings: BTreeMap::new(),
            names: Vec::new(),
            authority: Authority::shared(),
            expected: Expected::default(),
            installation: None,
        }
    }

    /// Shuts it down and puts a fresh server of that PostgreSQL in its place: same port, certificates and settings, no data.
    pub async fn replace(&mut self, installation: &'static Installation) -> Result<()> {
        if self.is_running() {
            self.stop(Shutdown::Fast).await?;
        }
        fs::remove_dir_all(self.data_directory())?;
        self.installation = installation;
        copy_template(installation, &self.data_directory())?;
        self.furnish()?;
        self.start().await
    }

    /// Which PostgreSQL it is.
    pub fn installation(&self) -> &'static Installation {
        self.installation
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// The folder of the unix socket, for `psql -h`.
    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// PGDATA.
    pub fn data_directory(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// How to reach it.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint { port: self.port(), socket_directory: self.directory.path().to_owned(), authority: self.authority }
    }

    /// Over TLS with a client certificate.
    pub async fn connect(&self, role: &str, database: &str) -> Result<Client> {
        self.endpoint().connect(role, database, "test").await.with_context(|| self.name.clone())
    }

    /// As [`Server::connect`], with its notifications.
    pub async fn listen(&self, role: &str, database: &str) -> Result<Listener> {
        self.endpoint().listen(role, database, "test").await.with_context(|| self.name.clone())
    }

    /// As `postgres` through the unix socket.
    pub async fn superuser(&self, database: &str) -> Result<Client> {
        self.endpoint().superuser(database).await.with_context(|| self.name.clone())
    }

    /// The first column of the first row, as superuser over a new session.
    pub async fn value<T>(&self, database: &str, query: &str) -> Result<T>
    where
        T: for<'a> tokio_postgres::types::FromSql<'a>,
    {
        let client = self.superuser(database).await?;
        let row = client.query_one(query, &[]).await.with_context(|| format!("{}: {query}", self.name))?;
        Ok(row.try_get(0)?)
    }

    /// Runs statements as superuser in a session of their own.
    pub async fn execute(&self, database: &str, statements: &str) -> Result<()> {
        let client = self.superuser(database).await?;
        client.batch_execute(statements).await.with_context(|| format!("{}: {statements}", self.name))
    }

    /// psql as superuser through the unix socket: unaligned output, stops at an error. Arguments may follow.
    pub fn psql_command(&self, database: &str) -> Command {
        let mut command = self.installation.command("psql");
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database]);
        command.arg("-h").arg(self.socket_directory()).args(["-p", &self.port().to_string()]);
        command
    }

    /// What psql prints for these statements.
    pub fn psql(&self, database: &str, statements: &str) -> Result<String> {
        Ok(postgres::run(self.psql_command(database).args(["-c", statements]))?.trim_end().to_owned())
    }

    /// What libpq needs to connect over TLS, verified in full, as that role. The files it names belong to our own user.
    pub fn conninfo(&self, role: &str, database: &str) -> Result<String> {
        let files = self.client_files(role, false)?;
        Ok(format!("host=127.0.0.1 port={} dbname={database} user={role} {files}", self.port()))
    }

    /// The TLS part of a connection string for this server's own processes as clients of another server.
    pub fn outgoing_tls(&self, role: &str) -> Result<String> {
        self.client_files(role, true)
    }

    /// libpq insists that a key belongs to who uses it, so the server's user gets files of its own.
    fn client_files(&self, role: &str, for_server: bool) -> Result<String> {
        let stem = self.directory.path().join("tls").join(if for_server {
            format!("server-as-{role}")
        } else {
            format!("client-{role}")
        });
        let (certificate, key) = (stem.with_extension("pem"), stem.with_extension("key"));
        if !key.exists() {
            let identity = self.authority.client(role)?;
            fs::write(&certificate, identity.certificate_pem()?)?;
            write_secret(&key, &identity.key_pem()?)?;
            if for_server {
                self.installation.server_user.own(&key)?;
            }
        }
        Ok(format!(
            "sslmode=verify-full sslrootcert={} sslcert={} sslkey={}",
            self.directory.path().join("tls/root.pem").display(),
            certificate.display(),
            key.display()
        ))
    }

    /// Replaces the server's certificate; in force after the next [`Server::reload`].
    pub fn install_certificate(&self, identity: &Identity) -> Result<()> {
        let tls = self.directory.path().join("tls");
        fs::write(tls.join("server.pem"), identity.certificate_pem()?)?;
        let key = tls.join("server.key");
        write_secret(&key, &identity.key_pem()?)?;
        self.installation.server_user.own(&key)
    }

    /// Changes postgresql.conf, and reloads it if the server runs. What needs a restart takes effect with the next one.
    pub async fn config(&self, settings: &[(&str, &str)]) -> Result<()> {
        lock(&self.settings).extend(settings.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())));
        self.write_config()?;
        if self.is_running() { self.reload().await } else { Ok(()) }
    }

    /// Has the configuration and the certificates read again, and waits until new sessions see it.
    pub async fn reload(&self) -> Result<()> {
        // Two loads within the clock's resolution would look like one.
        let loaded = "select extract(epoch from pg_conf_load_time())::float8";
        let before: f64 = self.value("postgres", loaded).await?;
        self.signal(signal::SIGHUP)?;
        let question = || async { Ok((self.value::<f64>("postgres", loaded).await? > before).then_some(())) };
        wait_until(&format!("{} to reload", self.name), PATIENCE, question).await
    }

    /// Starts it and waits until it accepts connections (a standby: reading ones).
    pub async fn start(&self) -> Result<()> {
        self.spawn()?;
        self.wait_ready().await
    }

    /// Starts it and does not wait.
    pub fn spawn(&self) -> Result<()> {
        let mut postmaster = lock(&self.postmaster);
        ensure!(postmaster.is_none(), "{} runs already", self.name);
        // SIGQUIT, not SIGKILL: an immediate shutdown takes the children along and removes the shared memory.
        let options: &[&str] = if self.lasting { &[] } else { &["--pdeathsig=QUIT"] };
        let mut command = self.installation.server_command("postgres", options);
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        command.arg("-D").arg(self.data_directory());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Ctrl-C is for us; we then stop the servers.
        command.process_group(0);
        *postmaster = Some(process::spawn(command)?);
        Ok(())
    }

    /// Waits until a spawned server accepts connections.
    pub async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            {
                let mut postmaster = lock(&self.postmaster);
                let child = postmaster.as_mut().with_context(|| format!("{} has not been started", self.name))?;
                if let Some(status) = child.try_wait()? {
                    *postmaster = None;
                    bail!("{} did not start ({status}):\n{}", self.name, self.log_tail(20));
                }
                // What pg_ctl -w reads: the first line is the pid, the eighth the state. A file left by a killed
                // server has another pid.
                let file = fs::read_to_string(self.data_directory().join("postmaster.pid")).unwrap_or_default();
                let lines: Vec<_> = file.lines().map(str::trim).collect();
                let own = lines.first() == Some(&child.id().to_string().as_str());
                if own && matches!(lines.get(7), Some(&("ready" | "standby"))) {
                    return Ok(());
                }
            }
            ensure!(Instant::now() < deadline, "{} does not get ready:\n{}", self.name, self.log_tail(20));
            sleep(GLANCE).await;
        }
    }

    /// Shuts it down and waits until all its processes are gone.
    pub async fn stop(&self, how: Shutdown) -> Result<()> {
        self.expect_weather();
        self.signal(how.signal())?;
        self.wait_gone().await
    }

    /// SIGKILL to the postmaster, as the out-of-memory killer would do it; waits until its children have noticed and gone.
    pub async fn kill(&self) -> Result<()> {
        self.expect_weather();
        self.signal(signal::SIGKILL)?;
        self.wait_gone().await
    }

    /// Stops it fast and starts it.
    pub async fn restart(&self) -> Result<()> {
        self.stop(Shutdown::Fast).await?;
        self.start().await
    }

    /// Whether the postmaster is there.
    pub fn is_running(&self) -> bool {
        matches!(lock(&self.postmaster).as_mut().map(Child::try_wait), Some(Ok(None)))
    }

    /// The postmaster's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.postmaster).as_ref().map(Child::id)
    }

    fn signal(&self, signal: signal::Signal) -> Result<()> {
        let pid = self.pid().with_context(|| format!("{} does not run", self.name))?;
        Ok(signal::kill(Pid::from_raw(pid.try_into()?), signal)?)
    }

    async fn wait_gone(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.is_running() || !process::living_in(&self.data_directory()).is_empty() {
            ensure!(Instant::now() < deadline, "{} does not end:\n{}", self.name, self.log_tail(20));
            sleep(GLANCE).await;
        }
        *lock(&self.postmaster) = None;
        Ok(())
    }

    /// A copy of its data directory, as `cp` makes it of a stopped server: not started, under another name, on another port.
    pub fn copy(&self, name: &str) -> Result<Server> {
        ensure!(!self.is_running(), "{} runs: its files change while they are copied", self.name);
        let server = self.twin(name)?;
        postgres::run(Command::new("cp").arg("-a").arg(self.data_directory()).arg(server.data_directory()))?;
        server.furnish()?;
        Ok(server)
    }

    /// A base backup of it, not started, under another name, on another port.
    pub fn base_backup(&self, name: &str, kind: Backup) -> Result<Server> {
        let server = self.twin(name)?;
        let mut command = self.installation.server_command("pg_basebackup", &[]);
        command.args(["-U", "postgres", "-c", "fast", "-X", "stream", "--no-sync", "-D"]).arg(server.data_directory());
        command.arg("-h").arg(self.socket_directory()).args(["-p", &self.port().to_string()]);
        postgres::run(&mut command)?;
        server.furnish()?;
        if kind == Backup::Standby {
            let primary = format!("host={} port={} user=postgres", self.socket_directory().display(), self.port());
            lock(&server.settings).insert("primary_conninfo".to_owned(), primary);
            server.write_config()?;
            let signal = server.data_directory().join("standby.signal");
            fs::write(&signal, "")?;
            self.installation.server_user.own(&signal)?;
        }
        Ok(server)
    }

    /// What pg_upgrade makes of it while it is stopped: another server, not started, under another name, on another port.
    pub fn upgrade(&self, name: &str) -> Result<Server> {
        ensure!(!self.is_running(), "{} runs", self.name);
        let server = self.twin(name)?;
        copy_template(server.installation, &server.data_directory())?;
        server.furnish()?;
        let mut command = self.installation.server_command("pg_upgrade", &[]);
        for (option, bindir) in [("-b", self.installation), ("-B", server.installation)] {
            command.arg(option).arg(&bindir.bindir);
        }
        command.arg("-d").arg(self.data_directory()).arg("-D").arg(server.data_directory());
        command.args(["-U", "postgres", "-p", &self.port().to_string(), "-P", &server.port().to_string()]);
        // It leaves scripts, logs and its sockets where it is run.
        postgres::run(command.current_dir(server.directory.path()))?;
        Ok(server)
    }

    /// Puts a backup that was never started in the place of its data directory, as after a disaster.
    pub fn restore(&self, backup: &Server) -> Result<()> {
        ensure!(!self.is_running() && !backup.is_running(), "{} or its backup runs", self.name);
        fs::remove_dir_all(self.data_directory())?;
        postgres::run(Command::new("cp").arg("-a").arg(backup.data_directory()).arg(self.data_directory()))?;
        Ok(())
    }

    /// A server that is configured alike, but for what makes it another one; without a data directory.
    fn twin(&self, name: &str) -> Result<Server> {
        let mut builder = Server::builder(name).authority(self.authority).shared_expected(&self.shared_expected);
        builder.lasting = self.lasting;
        builder.preload = false;
        let server = builder.frame()?;
        {
            let mut settings = lock(&server.settings);
            for (key, value) in lock(&self.settings).iter() {
                let own = key.starts_with("ssl_") || key == "unix_socket_directories";
                if !own {
                    let value = if key == "stillebot.node" { name } else { value };
                    settings.insert(key.clone(), value.to_owned());
                }
            }
        }
        Ok(server)
    }

    /// Everything logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The last lines logged.
    pub fn log_tail(&self, lines: usize) -> String {
        log_check::tail(&self.log(), lines)
    }

    /// Where the log is.
    pub fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// Allows log lines that contain this: SQLSTATE, database, application name, message. Allowed is not required.
    pub fn expect_log(&self, part: impl Into<String>) {
        self.own_expected.allow(part);
    }

    /// The entries of the log up to now that nobody expects.
    pub fn unexpected_log(&self) -> Vec<String> {
        log_check::unexpected(&self.log(), &[&self.own_expected, &self.shared_expected])
    }

    /// A server that goes away is noticed by itself and, in a cluster, by the others.
    fn expect_weather(&self) {
        self.own_expected.allow_weather();
        self.shared_expected.allow_weather();
    }

    /// Ends the test's use of it: an error if its log holds anything unexpected, or if it does not shut down cleanly.
    pub async fn finish(mut self) -> Result<()> {
        let mut findings = self.unexpected_log();
        if self.is_running() {
            // Its log from here on is about our own doing.
            self.stop(Shutdown::Fast).await?;
            // In PostgreSQL's words a client that is sent away before it was let in has taken too long.
            let ours = [" 57P0", "canceling authentication due to timeout"];
            findings.extend(
                self.unexpected_log().into_iter().filter(|entry| !ours.iter().any(|part| entry.contains(part))),
            );
            findings.sort();
            findings.dedup();
        }
        self.finished = true;
        let name = &self.name;
        ensure!(findings.is_empty(), "the log of {name} has lines nobody expected:\n{}", findings.join("\n"));
        Ok(())
    }

    /// Lets go of a [`ServerBuilder::lasting`] server: it runs on and its directory stays. Returns the command that stops it.
    pub fn leave_running(mut self) -> Result<String> {
        ensure!(self.lasting, "{} would end with this process", self.name);
        ensure!(self.is_running(), "{} does not run", self.name);
        self.directory.keep();
        self.finished = true;
        self.left = true;
        let mut stop = self.installation.server_command("pg_ctl", &[]);
        stop.arg("-D").arg(self.data_directory()).args(["-m", "fast", "stop"]);
        let words: Vec<_> =
            std::iter::once(stop.get_program()).chain(stop.get_args()).map(OsStr::to_string_lossy).collect();
        Ok(format!("{} && rm -r {}", words.join(" "), self.directory.path().display()))
    }

    /// Our own configuration in place of initdb's.
    fn furnish(&self) -> Result<()> {
        let data = self.data_directory();
        fs::write(
            data.join("pg_hba.conf"),
            "# Sockets are for the harness; TLS with a client certificate is for everybody else, as in life.\n\
             local   all         all  peer map=harness\n\
             local   replication all  peer map=harness\n\
             hostssl all         all  127.0.0.1/32  cert\n\
             hostssl replication all  127.0.0.1/32  cert\n",
        )?;
        fs::write(data.join("pg_ident.conf"), self.installation.local_users()?)?;
        fs::write(data.join("postgresql.conf"), "include '../postgresql.conf'\n")?;
        self.write_config()
    }

    fn write_config(&self) -> Result<()> {
        let mut text = format!("port = {}\n", self.port());
        for (key, value) in lock(&self.settings).iter() {
            writeln!(text, "{key} = '{}'", value.replace('\'', "''"))?;
        }
        Ok(fs::write(self.directory.path().join("postgresql.conf"), text)?)
    }
}

impl Shutdown {
    fn signal(self) -> signal::Signal {
        match self {
            Self::Fast => signal::SIGINT,
            Self::Immediate => signal::SIGQUIT,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        if !self.finished {
            eprintln!("--- end of the log of {}:\n{}\n---", self.name, self.log_tail(60));
        }
        if let Some(mut child) = lock(&self.postmaster).take() {
            let _ = signal::kill(Pid::from_raw(child.id().cast_signed()), Shutdown::Immediate.signal());
            let patience = Instant::now() + PATIENCE;
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < patience {
                thread::sleep(GLANCE);
            }
            let _ = child.kill();
            let _ = child.wait();
        } else {
            self.release_shared_memory();
        }
        for pid in process::living_in(&self.data_directory()) {
            let _ = signal::kill(pid, signal::SIGKILL);
        }
    }
}

impl Server {
    /// A killed postmaster leaves a System V segment, which its next start would have removed. Its id is the second
    /// number of the seventh line of the pid file that was left as well.
    fn release_shared_memory(&self) {
        let file = fs::read_to_string(self.data_directory().join("postmaster.pid")).unwrap_or_default();
        if let Some(id) = file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            let _ = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write_secret(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, [])?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(fs::write(path, content)?)
}

/// A new data directory without a second of initdb: a copy of one made earlier, with an identity of its own.
fn copy_template(installation: &Installation, data: &Path) -> Result<()> {
    let template = template(installation)?;
    postgres::run(Command::new("cp").args(["-r", "--reflink=auto"]).arg(&template).arg(data))?;
    set_system_identifier(data)?;
    fs::set_permissions(data, fs::Permissions::from_mode(0o700))?;
    if installation.server_user.is_other() {
        let owner = format!("{}:{}", installation.server_user.uid, installation.server_user.gid);
        postgres::run(Command::new("chown").args(["-R", &owner]).arg(data))?;
    }
    Ok(())
}

/// What initdb made of this PostgreSQL, in `target/`, shared by all runs until `make clean`.
fn template(installation: &Installation) -> Result<PathBuf> {
    let folder = postgres::workspace().join("target/initdb");
    let path = folder.join(installation.version.replace([' ', '/', '(', ')'], "-"));
    fs::create_dir_all(&folder)?;
    // Many tests start at once, in several processes: one makes it, the others wait.
    let guard = OpenOptions::new().create(true).append(true).open(folder.join("lock"))?;
    guard.lock()?;
    if !path.exists() {
        let scratch = Scratch::new("initdb")?;
        installation.server_user.own(scratch.path())?;
        let fresh = scratch.path().join("data");
        let mut command = installation.server_command("initdb", &[]);
        command.args(["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"]);
        postgres::run(command.arg(&fresh))?;
        let partial = path.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        postgres::run(Command::new("cp").arg("-r").arg(&fresh).arg(&partial))?;
        fs::rename(&partial, &path)?;
        scratch.discard()?;
    }
    Ok(path)
}

/// Copies of one template would all claim to be the same server. The identifier is in two places: the first eight bytes
/// of pg_control, which a CRC-32C at a place that depends on the version follows, and the first page of the WAL segment.
fn set_system_identifier(data: &Path) -> Result<()> {
    let mut identifier = [0; 8];
    openssl::rand::rand_bytes(&mut identifier)?;

    let control = data.join("global/pg_control");
    let mut bytes = fs::read(&control)?;
    let crc_at = (8..bytes.len() - 4)
        .step_by(4)
        .find(|&at| crc32c(&bytes[..at]).to_le_bytes() == bytes[at..at + 4])
        .context("no checksum found in pg_control")?;
    bytes[..8].copy_from_slice(&identifier);
    let crc = crc32c(&bytes[..crc_at]);
    bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
    fs::write(&control, bytes)?;

    /// XLogLongPageHeaderData.xlp_sysid, after the 24 bytes that every page header has.
    const WAL_IDENTIFIER: std::ops::Range<usize> = 24..32;
    for entry in fs::read_dir(data.join("pg_wal"))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let mut segment = fs::read(entry.path())?;
            segment[WAL_IDENTIFIER].copy_from_slice(&identifier);
            fs::write(entry.path(), segment)?;
        }
    }
    Ok(())
}

fn crc32c(bytes: &[u8]) -> u32 {
    /// The Castagnoli polynomial, reflected.
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 })
    })
}

/// Whether a test run wants its remains kept (`KEEP=1`); the demo leaves its servers running then.
pub fn keep_requested() -> bool {
    scratch::keep_requested()
}

#[cfg(test)]
mod tests {
    #[test]
    fn crc32c_is_the_one_of_rfc_3720() {
        assert_eq!(super::crc32c(b"123456789"), 0xE306_9283);
    }
}
