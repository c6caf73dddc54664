//! What this QEMU can do, looked up in its own schema.

use crate::command::commands;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Asks for the schema; about 240 KB.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryQmpSchema {}

/// One entry of the schema. Types have numbers for names.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// Name of the command or event, or number of the type.
    #[serde(default)]
    pub name: String,
    /// `command`, `event`, `object`, `enum`, `alternate` …
    #[serde(default)]
    pub meta_type: String,
    /// Type of a command's arguments.
    #[serde(default)]
    pub arg_type: Option<String>,
    /// Members of an object, or of an alternate or enum (there without name).
    #[serde(default)]
    pub members: Vec<Member>,
    /// Alternatives that depend on a tag.
    #[serde(default)]
    pub variants: Vec<Variant>,
    /// Values of an enum, in the older notation.
    #[serde(default)]
    pub values: Vec<String>,
}

/// One member of a type.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Member {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its type.
    #[serde(rename = "type", default)]
    pub kind: String,
}

/// One alternative of a type.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Variant {
    /// The tag's value.
    #[serde(default)]
    pub case: String,
    /// The type of the other members.
    #[serde(rename = "type", default)]
    pub kind: String,
}

/// The schema, ready for questions.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    entries: BTreeMap<String, Entry>,
}

impl Schema {
    /// Takes the answer of [`QueryQmpSchema`].
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { entries: entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect() }
    }

    /// Whether there is such a command.
    pub fn has_command(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.meta_type == "command")
    }

    /// Whether `blockdev-add` knows the driver.
    pub fn has_driver(&self, driver: &str) -> bool {
        self.driver(driver).is_some()
    }

    /// Whether `blockdev-add` knows the option of the driver.
    pub fn has_driver_option(&self, driver: &str, option: &str) -> bool {
        self.driver(driver).is_some_and(|entry| entry.members.iter().any(|member| member.name == option))
    }

    /// Whether an NBD export can show bitmaps of a node other than its own.
    pub fn exports_foreign_bitmaps(&self) -> bool {
        let nbd = self.arguments("block-export-add").and_then(|entry| self.variant(entry, "nbd"));
        let Some(bitmaps) = nbd.and_then(|nbd| nbd.members.iter().find(|member| member.name == "bitmaps"))
        else {
            return false;
        };
        // An array's type is its element's in brackets; a plain `str` there means the export's own node only.
        let element = bitmaps.kind.trim_start_matches('[').trim_end_matches(']');
        self.entries.get(element).is_some_and(|entry| entry.meta_type == "alternate")
    }

    /// Whether a transaction knows the action.
    pub fn has_transaction_action(&self, action: &str) -> bool {
        let Some(list) = self
            .arguments("transaction")
            .and_then(|entry| entry.members.iter().find(|m| m.name == "actions"))
        else {
            return false;
        };
        let element = list.kind.trim_start_matches('[').trim_end_matches(']');
        self.entries
            .get(element)
            .is_some_and(|entry| entry.variants.iter().any(|variant| variant.case == action))
    }

    fn arguments(&self, command: &str) -> Option<&Entry> {
        self.entries.get(self.entries.get(command)?.arg_type.as_ref()?)
    }

    fn variant(&self, entry: &Entry, case: &str) -> Option<&Entry> {
        let variant = entry.variants.iter().find(|variant| variant.case == case)?;
        self.entries.get(&variant.kind)
    }

    fn driver(&self, driver: &str) -> Option<&Entry> {
        self.variant(self.arguments("blockdev-add")?, driver)
    }
}

commands! {
    QueryQmpSchema => "query-qmp-schema" -> Vec<Entry>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(bitmaps: &str) -> Schema {
        let text = format!(
            r#"[
            {{"name": "stop", "meta-type": "command", "arg-type": "0", "ret-type": "0"}},
            {{"name": "blockdev-add", "meta-type": "command", "arg-type": "1"}},
            {{"name": "1", "meta-type": "object", "members": [], "variants": [{{"case": "copy-before-write", "type": "2"}}]}},
            {{"name": "2", "meta-type": "object", "members": [{{"name": "cbw-timeout", "type": "int", "default": null}}]}},
            {{"name": "block-export-add", "meta-type": "command", "arg-type": "3"}},
            {{"name": "3", "meta-type": "object", "variants": [{{"case": "nbd", "type": "4"}}]}},
            {{"name": "4", "meta-type": "object", "members": [{{"name": "bitmaps", "type": "{bitmaps}"}}]}},
            {{"name": "5", "meta-type": "alternate", "members": [{{"type": "str"}}]}},
            {{"name": "x", "meta-type": "something-new", "shape": {{}}}}
        ]"#
        );
        Schema::new(serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn features_are_found_by_schema() {
        let schema = schema("[5]");
        assert!(schema.has_command("stop") && !schema.has_command("5"));
        assert!(schema.has_driver("copy-before-write") && !schema.has_driver("snapshot-access"));
        assert!(schema.has_driver_option("copy-before-write", "cbw-timeout"));
        assert!(!schema.has_driver_option("copy-before-write", "min-cluster-size"));
        assert!(schema.exports_foreign_bitmaps());
    }

    #[test]
    fn an_older_export_shows_only_its_own_bitmaps() {
        assert!(!schema("[str]").exports_foreign_bitmaps());
    }
}
