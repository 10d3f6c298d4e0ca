//! What the agent's role has to be allowed, out of `sql/grants.sql`: for who grants it, and for who looks whether it is so.
//! Pure.

use crate::config::Config;
use crate::{quote, sql};

/// One privilege.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// `role`, `schema`, `table` or `function`.
    pub kind: &'static str,
    /// Its schema; empty for roles and schemas.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Of a function: the types of its arguments.
    pub arguments: String,
    /// What may be done; of a role, `set` to act as it, or empty to have what it has.
    pub privilege: String,
    /// The statement.
    pub statement: String,
}

/// Everything that the agent's role needs with this configuration, in an order in which it can be granted.
pub fn wanted(config: &Config) -> Vec<Grant> {
    let role = quote::name(&config.user);
    let mut grants: Vec<Grant> = sql::GRANTS.lines().filter_map(|line| grant(line, &role)).collect();
    if let Some(active) = &config.active {
        let (schema, table) = &active.place;
        let name = format!("{}.{}", quote::name(schema), quote::name(table));
        let mut add = |kind, of: &str, name: &str, privilege: &str, what: &str| {
            grants.push(Grant {
                kind,
                schema: of.to_owned(),
                name: name.to_owned(),
                arguments: String::new(),
                privilege: privilege.to_owned(),
                statement: format!("grant {privilege} on {kind} {what} to {role}"),
            });
        };
        add("schema", "", schema, "usage", &quote::name(schema));
        for privilege in ["select", "update"] {
            add("table", schema, table, privilege, &name);
        }
    }
    if let Some(owner) = &config.schema_role {
        grants.push(Grant {
            kind: "role",
            schema: String::new(),
            name: owner.clone(),
            arguments: String::new(),
            privilege: "set".to_owned(),
            statement: format!("grant {} to {role} with inherit false, set true", quote::name(owner)),
        });
    }
    grants
}

/// Reads a line of the file: `grant PRIVILEGE on KIND OBJECT to {role};` or `grant ROLE to {role};`.
fn grant(line: &str, role: &str) -> Option<Grant> {
    let text = line.strip_prefix("grant ")?.strip_suffix(" to {role};")?;
    let statement = format!("grant {text} to {role}");
    let Some((privilege, object)) = text.split_once(" on ") else {
        return Some(Grant {
            kind: "role",
            schema: String::new(),
            name: text.to_owned(),
            arguments: String::new(),
            privilege: String::new(),
            statement,
        });
    };
    let (kind, object) = object.split_once(' ')?;
    let kind = ["schema", "table", "function"].into_iter().find(|known| *known == kind)?;
    let (object, arguments) = object.strip_suffix(')').and_then(|text| text.split_once('(')).unwrap_or((object, ""));
    let (schema, name) = object.split_once('.').unwrap_or(("", object));
    Some(Grant {
        kind,
        schema: schema.to_owned(),
        name: name.to_owned(),
        arguments: arguments.to_owned(),
        privilege: privilege.to_owned(),
        statement,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;

    #[test]
    fn every_statement_of_the_file_is_understood() {
        let environment = Environment { variable: &|_| None, os_user: None };
        let text = "user = \"Agent\"\ndatabase = \"d\"\n[active]\ntable = \"app.settings\"\ncolumn = \"c\"\n[[node]]\nname = \"a\"\nhost = \"a\"";
        let grants = wanted(&Config::parse(text, &environment).unwrap());
        let lines = sql::GRANTS.lines().filter(|line| line.starts_with("grant")).count();
        assert_eq!(grants.len(), lines + 3);
        assert!(grants.iter().all(|grant| grant.statement.ends_with(" to \"Agent\"")));
        let resolve = grants.iter().find(|grant| grant.name == "stillebot_resolve").unwrap();
        assert_eq!((resolve.schema.as_str(), resolve.arguments.as_str()), ("public", "bigint, text"));
        assert_eq!(grants[0].kind, "role");
        assert_eq!(grants.last().unwrap().statement, "grant update on table app.settings to \"Agent\"");
        let text = format!("{text}\n[schema]\nrole = \"Owner\"");
        let grants = wanted(&Config::parse(&text, &environment).unwrap());
        assert_eq!(grants.last().unwrap().statement, "grant \"Owner\" to \"Agent\" with inherit false, set true");
    }
}
