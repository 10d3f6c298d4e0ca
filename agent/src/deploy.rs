//! Where a certificate and its key are put, so that whoever reads the two always gets a pair, whenever the power fails.
//!
//! Two files cannot be replaced in one step, but one symbolic link can. So the configured paths are links that never change,
//! through one link that does:
//!
//! ```text
//! certificate.pem -> .certificate.pem/current/certificate.pem
//! privkey.pem     -> .certificate.pem/current/privkey.pem
//! .certificate.pem/current -> 7                               replaced by rename(2)
//! .certificate.pem/7/{certificate.pem,privkey.pem}            written once, never changed
//! .certificate.pem/back -> 6                                  as long as version 7 is not proven
//! ```
//!
//! Files that are there from before are taken in without a moment in which what is read changes: their contents become a
//! version, `current` leads to it, then each path becomes a link to what it was. PostgreSQL and libpq look at what a link leads
//! to, which has owner and mode as they want them.
//!
//! Everything is reached from the opened directory, no link is followed but `current` and `back`, which are read and must be numbers; a
//! key is never readable by others, not for a moment. Deliberately knows nothing of certificates, nor of servers.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fsync, symlinkat, unlinkat};

/// The link that says which version is in force.
const CURRENT: &str = "current";
/// The link that says which version was in force before one that is not proven yet.
const BACK: &str = "back";
/// What a link is called before it takes its place.
const NEXT: &str = "next";
/// More than any certificate or key has.
const MOST_BYTES: u64 = 1 << 20;

/// One place: a directory and two names in it.
pub struct Place {
    directory: OwnedFd,
    path: PathBuf,
    names: [String; 2],
    uid: Option<Uid>,
    gid: Option<Gid>,
    mode: Mode,
}

/// A pair of files: certificates, key; each may be missing.
pub type Files = [Option<Vec<u8>>; 2];

/// What went wrong with which file. The text of an operating system's error holds nothing of a file's content.
fn failed(what: &str, path: &Path, error: impl Into<io::Error>) -> String {
    let error: io::Error = error.into();
    format!("cannot {what} {}: {error}", path.display())
}

impl Place {
    /// Opens the directory of a certificate and its key.
    pub fn open(cert: &Path, key: &Path, uid: Option<Uid>, gid: Option<Gid>, mode: u32) -> Result<Self, String> {
        let path = cert.parent().unwrap_or(Path::new("/")).to_owned();
        let name = |path: &Path| path.file_name().and_then(OsStr::to_str).map(str::to_owned);
        let (Some(cert), Some(key)) = (name(cert), name(key)) else { return Err("the files have no names".into()) };
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = open(&path, flags, Mode::empty()).map_err(|error| match error {
            // What Linux says of a link here is that it is no directory, or one link too many.
            Errno::ENOTDIR | Errno::ELOOP if path.is_symlink() => {
                format!(
                    "{} is a symbolic link, and links are not followed: configure where it leads to",
                    path.display()
                )
            }
            error => failed("open the directory", &path, error),
        })?;
        let stat = fstat(&directory).map_err(|error| failed("look at", &path, error))?;
        let (owner, wanted) = (Uid::from_raw(stat.st_uid), uid.unwrap_or_else(Uid::effective));
        if !owner.is_root() && owner != wanted {
            return Err(format!(
                "the directory {} belongs to neither root nor the files' owner, so somebody else could replace what is \
                 put there",
                path.display()
            ));
        }
        let mode = Mode::from_bits_truncate(mode);
        Ok(Self { directory, path, names: [cert, key], uid, gid, mode })
    }

    /// Who owns the directory.
    pub fn directory_owner(&self) -> Result<Uid, String> {
        let stat = fstat(&self.directory).map_err(|error| failed("look at", &self.path, error))?;
        Ok(Uid::from_raw(stat.st_uid))
    }

    /// Whose the files are to be.
    pub fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        (self.uid, self.gid)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    // ---- looking ----

    /// What whoever opens the two paths now gets to read.
    pub fn files(&self) -> Result<Files, String> {
        let [cert, key] = &self.names;
        Ok([self.read(cert)?, self.read(key)?])
    }

    /// The version in force.
    pub fn current(&self) -> Result<Option<u32>, String> {
        self.version(CURRENT)
    }

    /// The version that was in force before one that was never proven.
    pub fn back(&self) -> Result<Option<u32>, String> {
        self.version(BACK)
    }

    /// What is in a version.
    pub fn files_of(&self, version: u32) -> Result<Files, String> {
        let [cert, key] = &self.names;
        Ok([self.read_version(version, cert)?, self.read_version(version, key)?])
    }

    fn version(&self, link: &str) -> Result<Option<u32>, String> {
        let Some(vault) = self.vault()? else { return Ok(None) };
        match readlinkat(&vault, link) {
            Ok(version) => {
                let number = version.to_str().and_then(|text| text.parse().ok());
                let flaw = || format!("{} does not lead to a version", self.inside(link).display());
                number.ok_or_else(flaw).map(Some)
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(failed("read", &self.inside(link), error)),
        }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, String> {
        match self.kind(name)? {
            None => Ok(None),
            Some(SFlag::S_IFREG) => read_in(&self.directory, name, &self.path.join(name)).map(Some),
            // Ours; it leads nowhere as long as there is no version.
            _ => match self.current()? {
                Some(version) => self.read_version(version, name),
                None => Ok(None),
            },
        }
    }

    fn read_version(&self, version: u32, name: &str) -> Result<Option<Vec<u8>>, String> {
        let path = self.inside(&format!("{version}/{name}"));
        let Some(vault) = self.vault()? else { return Ok(None) };
        let directory = match open_directory(&vault, &version.to_string()) {
            Err(Errno::ENOENT) => return Ok(None),
            other => other.map_err(|error| failed("open", &path, error))?,
        };
        match fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => Ok(None),
            _ => read_in(&directory, name, &path).map(Some),
        }
    }

    /// What is at a path: nothing, a file, or a link of ours; anything else is refused.
    fn kind(&self, name: &str) -> Result<Option<SFlag>, String> {
        let path = self.path.join(name);
        let stat = match fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(failed("look at", &path, error)),
        };
        match kind(&stat) {
            SFlag::S_IFREG => Ok(Some(SFlag::S_IFREG)),
            SFlag::S_IFLNK => {
                let target = readlinkat(&self.directory, name).map_err(|error| failed("read", &path, error))?;
                if target.to_str() == Some(self.target(name).as_str()) {
                    return Ok(Some(SFlag::S_IFLNK));
                }
                Err(format!(
                    "{} is a symbolic link to {}, and links are not followed: remove it, or configure where it leads to",
                    path.display(),
                    Path::new(&target).display()
                ))
            }
            _ => Err(format!("{} is not a file", path.display())),
        }
    }

    // ---- the steps ----

    /// Writes a version, on disk when this returns, in force nowhere.
    pub fn stage(&self, files: &Files) -> Result<u32, String> {
        let vault = self.make_vault()?;
        let version = self.versions(&vault)?.into_iter().max().map_or(1, |last| last + 1);
        let written = self.write_version(&vault, version, files);
        if written.is_err() {
            self.remove_version(&vault, version);
        }
        written.map(|()| version)
    }

    fn write_version(&self, vault: &OwnedFd, version: u32, files: &Files) -> Result<(), String> {
        let name = version.to_string();
        let path = self.inside(&name);
        mkdirat(vault, name.as_str(), Mode::S_IRWXU).map_err(|error| failed("make", &path, error))?;
        let directory = open_directory(vault, &name).map_err(|error| failed("open", &path, error))?;
        for (name, content) in self.names.iter().zip(files) {
            let Some(content) = content else { continue };
            let path = path.join(name);
            let write = || -> io::Result<()> {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                // Nobody else's from its first moment on; the configured mode is never wider for the world.
                let mut file = File::from(openat(&directory, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
                file.write_all(content)?;
                self.own(&file)?;
                fchmod(&file, self.mode)?;
                file.sync_all()
            };
            write().map_err(|error| failed("write", &path, error))?;
        }
        self.finish_directory(&directory, &path)?;
        sync(vault, &self.inside(""))
    }

    /// Makes a link to the present version's file of a path that holds a file, or nothing: what is read there stays the same.
    pub fn link(&self, which: usize) -> Result<(), String> {
        let name = &self.names[which];
        if self.kind(name)? == Some(SFlag::S_IFLNK) {
            return Ok(());
        }
        self.put_link(&self.directory, &format!(".{name}.{NEXT}"), name, &self.target(name), &self.path)
    }

    /// Both paths are links.
    pub fn is_linked(&self) -> Result<bool, String> {
        let [cert, key] = &self.names;
        Ok(self.kind(cert)? == Some(SFlag::S_IFLNK) && self.kind(key)? == Some(SFlag::S_IFLNK))
    }

    /// Puts a version in force: one step, and on disk when this returns.
    pub fn switch(&self, version: u32) -> Result<(), String> {
        let vault = self.make_vault()?;
        self.put_link(&vault, NEXT, CURRENT, &version.to_string(), &self.inside(""))
    }

    /// Remembers, across whatever happens to this run, which version to go back to.
    pub fn remember(&self, version: u32) -> Result<(), String> {
        let vault = self.make_vault()?;
        self.put_link(&vault, NEXT, BACK, &version.to_string(), &self.inside(""))
    }

    /// The version in force is proven, or it is the one to go back to.
    pub fn forget(&self) -> Result<(), String> {
        let Some(vault) = self.vault()? else { return Ok(()) };
        match unlinkat(&vault, BACK, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            Ok(()) => sync(&vault, &self.inside("")),
            Err(error) => Err(failed("remove", &self.inside(BACK), error)),
        }
    }

    /// Removes a version that is not in force.
    pub fn discard(&self, version: u32) -> Result<(), String> {
        let Some(vault) = self.vault()? else { return Ok(()) };
        if self.current()? != Some(version) {
            self.remove_version(&vault, version);
        }
        Ok(())
    }

    /// Removes all versions but these.
    pub fn prune(&self, keep: &[u32]) -> Result<(), String> {
        let Some(vault) = self.vault()? else { return Ok(()) };
        for version in self.versions(&vault)? {
            if !keep.contains(&version) && self.current()? != Some(version) {
                self.remove_version(&vault, version);
            }
        }
        Ok(())
    }

    // ---- under them ----

    fn put_link(&self, directory: &OwnedFd, next: &str, name: &str, target: &str, path: &Path) -> Result<(), String> {
        let path = path.join(name);
        let put = || -> nix::Result<()> {
            // What a run that was cut off has left.
            match unlinkat(directory, next, UnlinkatFlags::NoRemoveDir) {
                Err(Errno::ENOENT) | Ok(()) => {}
                Err(error) => return Err(error),
            }
            symlinkat(target, directory, next)?;
            // The link itself before its name: what takes the place must not be empty after a power failure.
            fsync(directory)?;
            renameat(directory, next, directory, name)?;
            fsync(directory)
        };
        put().map_err(|error| failed("replace", &path, error))
    }

    fn make_vault(&self) -> Result<OwnedFd, String> {
        if let Some(vault) = self.vault()? {
            return Ok(vault);
        }
        let (name, path) = (self.vault_name(), self.inside(""));
        mkdirat(&self.directory, name.as_str(), Mode::S_IRWXU).map_err(|error| failed("make", &path, error))?;
        let vault = open_directory(&self.directory, &name).map_err(|error| failed("open", &path, error))?;
        self.finish_directory(&vault, &path)?;
        sync(&self.directory, &self.path)?;
        Ok(vault)
    }

    fn vault(&self) -> Result<Option<OwnedFd>, String> {
        match open_directory(&self.directory, &self.vault_name()) {
            Ok(vault) => Ok(Some(vault)),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(failed("open", &self.inside(""), error)),
        }
    }

    fn vault_name(&self) -> String {
        format!(".{}", self.names[0])
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.path.join(self.vault_name()).join(name)
    }

    fn target(&self, name: &str) -> String {
        format!("{}/{CURRENT}/{name}", self.vault_name())
    }

    fn versions(&self, vault: &OwnedFd) -> Result<Vec<u32>, String> {
        let read = || -> nix::Result<Vec<u32>> {
            let mut versions = Vec::new();
            for entry in Dir::openat(vault, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?.iter() {
                versions.extend(entry?.file_name().to_str().ok().and_then(|name| name.parse::<u32>().ok()));
            }
            Ok(versions)
        };
        read().map_err(|error| failed("list", &self.inside(""), error))
    }

    /// What cannot be removed now is in nobody's way, and is tried again the next time.
    fn remove_version(&self, vault: &OwnedFd, version: u32) {
        let name = version.to_string();
        if let Ok(directory) = open_directory(vault, &name) {
            for name in &self.names {
                let _ = unlinkat(&directory, name.as_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
        if let Err(error) = unlinkat(vault, name.as_str(), UnlinkatFlags::RemoveDir) {
            tracing::debug!(%error, version, "not removed");
        }
    }

    /// Gives a directory to the owner of the files; who may read those may pass.
    fn finish_directory(&self, directory: &OwnedFd, path: &Path) -> Result<(), String> {
        let pass = Mode::from_bits_truncate((self.mode.bits() & 0o444) >> 2);
        let finish = || -> nix::Result<()> {
            self.own(directory)?;
            fchmod(directory, Mode::S_IRWXU | self.mode | pass)?;
            fsync(directory)
        };
        finish().map_err(|error| failed("finish", path, error))
    }

    fn own(&self, file: impl AsFd) -> nix::Result<()> {
        fchown(file, self.uid, self.gid)
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn open_directory(parent: &OwnedFd, name: &str) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

fn read_in(directory: &OwnedFd, name: &str, path: &Path) -> Result<Vec<u8>, String> {
    let read = || -> io::Result<Vec<u8>> {
        // Not to hang on what became a pipe meanwhile.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = File::from(openat(directory, name, flags, Mode::empty())?);
        let mut content = Vec::new();
        file.take(MOST_BYTES).read_to_end(&mut content)?;
        Ok(content)
    };
    read().map_err(|error| failed("read", path, error))
}

fn sync(directory: &OwnedFd, path: &Path) -> Result<(), String> {
    fsync(directory).map_err(|error| failed("write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn place(&self) -> Place {
            Place::open(&self.path("c.pem"), &self.path("k.pem"), None, None, 0o600).unwrap()
        }

        fn write(&self, pair: &str) {
            fs::write(self.path("c.pem"), format!("cert {pair}")).unwrap();
            fs::write(self.path("k.pem"), format!("key {pair}")).unwrap();
        }

        /// As PostgreSQL reads.
        fn read(&self) -> [Option<String>; 2] {
            ["c.pem", "k.pem"].map(|name| fs::read_to_string(self.path(name)).ok())
        }
    }

    fn files(pair: &str) -> Files {
        [Some(format!("cert {pair}").into_bytes()), Some(format!("key {pair}").into_bytes())]
    }

    fn read(pair: &str) -> [Option<String>; 2] {
        [Some(format!("cert {pair}")), Some(format!("key {pair}"))]
    }

    /// Takes in what is there, as `cmd/certs.rs` does it.
    fn adopt(place: &Place, after_each: &dyn Fn()) {
        if place.is_linked().unwrap() {
            return;
        }
        let version = place.stage(&place.files().unwrap()).unwrap();
        after_each();
        place.switch(version).unwrap();
        after_each();
        for which in 0..2 {
            place.link(which).unwrap();
            after_each();
        }
    }

    #[test]
    fn files_become_links_and_read_the_same_at_every_step() {
        let folder = Folder::new();
        folder.write("old");
        let place = folder.place();
        adopt(&place, &|| assert_eq!(folder.read(), read("old")));
        let version = place.stage(&files("new")).unwrap();
        assert_eq!(folder.read(), read("old"));
        place.switch(version).unwrap();
        assert_eq!(folder.read(), read("new"));
        assert_eq!(place.files().unwrap(), files("new"));
    }

    #[test]
    fn the_first_pair_of_a_directory_appears_at_once() {
        let folder = Folder::new();
        let place = folder.place();
        assert_eq!(place.files().unwrap(), [None, None]);
        adopt(&place, &|| assert_eq!(folder.read(), [None, None]));
        place.switch(place.stage(&files("new")).unwrap()).unwrap();
        assert_eq!(folder.read(), read("new"));
        // And back to nothing.
        place.switch(1).unwrap();
        assert_eq!(folder.read(), [None, None]);
    }

    #[test]
    fn a_run_cut_off_anywhere_is_gone_on_with() {
        for cut in 0..4 {
            let folder = Folder::new();
            folder.write("old");
            let place = folder.place();
            let version = place.stage(&place.files().unwrap()).unwrap();
            if cut > 0 {
                place.switch(version).unwrap();
            }
            for which in 1..cut {
                place.link(which - 1).unwrap();
            }
            assert_eq!(folder.read(), read("old"), "{cut}");
            let place = folder.place();
            adopt(&place, &|| assert_eq!(folder.read(), read("old"), "{cut}"));
            place.switch(place.stage(&files("new")).unwrap()).unwrap();
            assert_eq!(folder.read(), read("new"), "{cut}");
        }
    }

    #[test]
    fn files_put_there_by_hand_afterwards_are_taken_in_again() {
        let folder = Folder::new();
        let place = folder.place();
        adopt(&place, &|| ());
        place.switch(place.stage(&files("ours")).unwrap()).unwrap();
        // As mv would do it.
        for name in ["c.pem", "k.pem"] {
            fs::remove_file(folder.path(name)).unwrap();
        }
        folder.write("hand");
        assert_eq!(place.files().unwrap(), files("hand"));
        adopt(&place, &|| assert_eq!(folder.read(), read("hand")));
    }

    #[test]
    fn a_link_to_elsewhere_is_not_followed() {
        let folder = Folder::new();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("victim"), "untouched").unwrap();
        symlink(elsewhere.path().join("victim"), folder.path("c.pem")).unwrap();
        assert!(folder.place().files().unwrap_err().contains("is a symbolic link to"));
        assert!(folder.place().link(0).is_err());
        fs::remove_file(folder.path("c.pem")).unwrap();
        symlink(elsewhere.path(), folder.path(".c.pem")).unwrap();
        assert!(folder.place().stage(&files("new")).is_err());
        fs::remove_file(folder.path(".c.pem")).unwrap();
        // A version that is not a number leads nowhere either.
        fs::create_dir(folder.path(".c.pem")).unwrap();
        symlink(elsewhere.path(), folder.path(".c.pem/current")).unwrap();
        assert!(folder.place().current().unwrap_err().contains("does not lead to a version"));
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_way_back_is_remembered_until_it_is_no_longer_needed() {
        let folder = Folder::new();
        folder.write("old");
        let place = folder.place();
        adopt(&place, &|| ());
        let (old, new) = (place.current().unwrap().unwrap(), place.stage(&files("new")).unwrap());
        place.remember(old).unwrap();
        place.switch(new).unwrap();
        // Whoever comes next.
        let place = folder.place();
        assert_eq!(place.back(), Ok(Some(old)));
        assert_eq!(place.files_of(old).unwrap(), files("old"));
        place.discard(new).unwrap();
        assert_eq!(folder.read(), read("new"), "what is in force stays");
        place.switch(old).unwrap();
        place.forget().unwrap();
        place.discard(new).unwrap();
        assert_eq!((place.back(), folder.read()), (Ok(None), read("old")));
        assert_eq!(place.files_of(new).unwrap(), [None, None]);
    }

    #[test]
    fn a_directory_that_is_a_link_is_not_entered() {
        let folder = Folder::new();
        fs::create_dir(folder.path("real")).unwrap();
        let link = folder.path("link");
        symlink("real", &link).unwrap();
        let flaw = Place::open(&link.join("c.pem"), &link.join("k.pem"), None, None, 0o600).err().unwrap();
        assert!(flaw.contains("is a symbolic link"), "{flaw}");
    }

    #[test]
    fn nobody_else_can_read_and_old_versions_go() {
        let folder = Folder::new();
        let place = folder.place();
        adopt(&place, &|| ());
        for pair in ["a", "b", "c"] {
            place.switch(place.stage(&files(pair)).unwrap()).unwrap();
        }
        place.prune(&[3]).unwrap();
        let mut left: Vec<String> = fs::read_dir(folder.path(".c.pem"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["3", "4", "current"]);
        for path in [".c.pem", ".c.pem/4"] {
            assert_eq!(fs::metadata(folder.path(path)).unwrap().permissions().mode() & 0o777, 0o700, "{path}");
        }
        assert_eq!(fs::metadata(folder.path("k.pem")).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
