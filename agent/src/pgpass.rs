//! The password file of libpq, `~/.pgpass` or `$PGPASSFILE`: one `host:port:database:user:password` a line.
//!
//! Deliberately pure but for [`read`]; never prints or logs a line of the file.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The password of the first line that fits, as libpq chooses it: `*` fits anything, `\:` and `\\` are escapes, `#` begins
/// a comment. A socket directory is looked for by its path and as `localhost`.
pub fn lookup(text: &str, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
    let port = port.to_string();
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = fields(line)?;
        let fits = |field: &Field, wanted: &str| field.any || field.text == wanted;
        let host_fits = fits(&fields[0], host) || (host.starts_with('/') && fields[0].text == "localhost");
        let rest_fits = fits(&fields[1], &port) && fits(&fields[2], database) && fits(&fields[3], user);
        (host_fits && rest_fits).then(|| fields[4].text.clone())
    })
}

struct Field {
    text: String,
    /// A bare `*`.
    any: bool,
}

fn fields(line: &str) -> Option<[Field; 5]> {
    let mut fields = Vec::with_capacity(5);
    let (mut text, mut escaped) = (String::new(), false);
    let mut chars = line.trim_end_matches('\r').chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                escaped = true;
                // A backslash at the very end stands for itself.
                text.push(chars.next().unwrap_or('\\'));
            }
            ':' if fields.len() < 4 => {
                fields.push(Field { any: text == "*" && !escaped, text: std::mem::take(&mut text) });
                escaped = false;
            }
            // libpq ends the password at a further colon.
            ':' => break,
            c => text.push(c),
        }
    }
    fields.push(Field { any: false, text });
    fields.try_into().ok()
}

/// The text of the file, if it is there and nobody else can read it; libpq, too, ignores a file that others can read.
pub fn read(path: &Path) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() {
        return None;
    }
    if metadata.mode() & 0o077 != 0 {
        tracing::warn!(
            "password file {} is accessible to group or others and is ignored; chmod 0600 it",
            path.display()
        );
        return None;
    }
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_line_that_fits_wins() {
        let text = "# comment\nother:5432:db:me:no\n*:*:db:me:yes\n*:*:*:*:late\n";
        assert_eq!(lookup(text, "host", 5432, "db", "me").as_deref(), Some("yes"));
        assert_eq!(lookup(text, "host", 5432, "db2", "me").as_deref(), Some("late"));
        assert_eq!(lookup("", "host", 5432, "db", "me"), None);
    }

    #[test]
    fn escapes_and_stars() {
        assert_eq!(lookup(r"::1:5432:a:b:c", "::1", 5432, "a", "b"), None);
        assert_eq!(lookup(r"\:\:1:5432:a:b:c\:d\\e", "::1", 5432, "a", "b").as_deref(), Some(r"c:d\e"));
        assert_eq!(lookup(r"\*:5432:a:b:c", "host", 5432, "a", "b"), None);
        assert_eq!(lookup(r"*:5432:a:b:c:d", "host", 5432, "a", "b").as_deref(), Some("c"));
        assert_eq!(lookup("localhost:*:*:*:s", "/run/postgresql", 5432, "a", "b").as_deref(), Some("s"));
    }

    #[test]
    fn a_file_others_can_read_is_ignored() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("stillebot-pgpass-{}", std::process::id()));
        std::fs::write(&path, "*:*:*:*:x").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(read(&path), None);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(read(&path).is_some());
        std::fs::remove_file(&path).unwrap();
    }

    fn escape(text: &str) -> String {
        text.replace('\\', r"\\").replace(':', r"\:")
    }

    proptest! {
        #[test]
        fn what_is_escaped_is_found(host in "[a-z:.\\\\]{1,20}", database in "[a-z:\\\\]{1,9}", password in "[ -~]{1,20}") {
            let line = format!("{}:1:{}:u:{}", escape(&host), escape(&database), escape(&password));
            prop_assert_eq!(lookup(&line, &host, 1, &database, "u"), Some(password));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}") {
            let _ = lookup(&text, "h", 1, "d", "u");
        }
    }
}
