//! A text with columns of a row in it: `{twitchid}:{cmdname}`.
//!
//! Deliberately no language: a column's value as PostgreSQL would print it, and `{{` and `}}` for braces themselves.

use serde_json::Value;

/// A text with columns in it, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Column(String),
}

impl Template {
    /// Reads a text; the error says which brace is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '{' | '}' if chars.next_if_eq(&c).is_some() => plain.push(c),
                '}' => return Err("a } without its {; write }} for the character itself".into()),
                '{' => {
                    let mut column = String::new();
                    loop {
                        match chars.next() {
                            Some('}') => break,
                            Some('{') | None => {
                                return Err("a { without its }; write {{ for the character itself".into());
                            }
                            Some(c) => column.push(c),
                        }
                    }
                    if column.is_empty() {
                        return Err("a {} without a column in it".into());
                    }
                    if !plain.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut plain)));
                    }
                    parts.push(Part::Column(column));
                }
                c => plain.push(c),
            }
        }
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self(parts))
    }

    /// The text with the values of this row, a JSON object. A null leaves nothing; a column that the row does not have is an
    /// error that names it.
    pub fn fill(&self, row: &Value) -> Result<String, String> {
        let mut text = String::new();
        for part in &self.0 {
            match part {
                Part::Text(plain) => text.push_str(plain),
                Part::Column(column) => match row.get(column) {
                    None => return Err(format!("the row has no column {column}")),
                    Some(Value::Null) => {}
                    Some(Value::String(value)) => text.push_str(value),
                    Some(value) => text.push_str(&value.to_string()),
                },
            }
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn fill(template: &str, row: Value) -> Result<String, String> {
        Template::parse(template)?.fill(&row)
    }

    #[test]
    fn columns_are_filled_in() {
        let row =
            json!({"twitchid": 49_497_888, "cmdname": "hello", "active": true, "content": {"a": [1]}, "none": null});
        assert_eq!(fill("{twitchid}:{cmdname}", row.clone()).unwrap(), "49497888:hello");
        assert_eq!(fill("", row.clone()).unwrap(), "");
        assert_eq!(fill("{active} {content} [{none}]", row.clone()).unwrap(), r#"true {"a":[1]} []"#);
        assert_eq!(fill("{{{cmdname}}}", row).unwrap(), "{hello}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (template, expected) in
            [("{a", "a { without"), ("a}", "a } without"), ("{}", "without a column"), ("{a{b}}", "a { without")]
        {
            let flaw = Template::parse(template).unwrap_err();
            assert!(flaw.contains(expected), "{template}: {flaw}");
        }
        assert_eq!(fill("{cmdnam}", json!({"cmdname": "x"})).unwrap_err(), "the row has no column cmdnam");
        assert!(fill("{a}", json!(null)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_and_no_row_makes_it_panic(text in "[{}a-c]{0,20}|\\PC{0,40}", value in "\\PC{0,20}") {
            if let Ok(template) = Template::parse(&text) {
                let _ = template.fill(&json!({"a": value, "b": null}));
                let _ = template.fill(&json!([value]));
            }
        }

        #[test]
        fn text_without_braces_stays_as_it_is(text in "[^{}]{0,40}") {
            prop_assert_eq!(fill(&text, json!({})), Ok(text));
        }
    }
}
