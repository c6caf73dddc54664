//! Arguments of every command, of every type and depth. Whatever they are: reading them ends, twice with the same outcome;
//! a refusal is of the generic class, short, and in the words that hosts know; and a member that no command knows is never
//! passed over.
#![no_main]

use arbitrary::Arbitrary;
use guest_protocol::members::Members;
use guest_protocol::{COMMANDS, Class};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Number, Value};

/// Longest description of a refusal: a name and a value, 1,024 bytes each at most, and the words around them.
const DESC_BYTES_MAX: usize = 4096;

#[derive(Arbitrary, Debug)]
enum Json {
    Null,
    Bool(bool),
    Int(i64),
    Large(u64),
    Double(f64),
    Text(Text),
    List(Vec<Json>),
    Object(Vec<(Name, Json)>),
}

#[derive(Arbitrary, Debug)]
enum Text {
    Word(u8),
    Base64(Vec<u8>),
    Any(String),
}

#[derive(Arbitrary, Debug)]
enum Name {
    Known(u8),
    Any(String),
}

/// Every name of an argument.
const NAMES: &[&str] = &[
    "id",
    "time",
    "mode",
    "path",
    "handle",
    "count",
    "buf-b64",
    "offset",
    "whence",
    "mountpoints",
    "minimum",
    "vcpus",
    "logical-id",
    "online",
    "can-offline",
    "username",
    "password",
    "crypted",
    "mem-blks",
    "phys-index",
    "pid",
    "arg",
    "env",
    "input-data",
    "capture-output",
    "keys",
    "reset",
    "lease_ms",
    "prepare_ms_max",
    "quiesce_ms_max",
    "budget_ms",
    "want",
    "applications",
    "kind",
    "instance",
    "policy",
    "stillpoint-time-limit-ms",
    "stillpoint-kill",
];

/// Texts that mean something somewhere.
const WORDS: &[&str] = &[
    "",
    "r",
    "w+",
    "set",
    "cur",
    "end",
    "halt",
    "powerdown",
    "reboot",
    "none",
    "stdout",
    "merged",
    "separated",
    "=",
    "eHg=",
    "application",
    "filesystem",
    "required",
    "preferred",
    "off",
    "postgresql",
    "run1",
    "/",
    "\0",
    "a\nb",
    "u:v",
];

fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::Null,
        Json::Bool(truth) => Value::Bool(*truth),
        Json::Int(number) => Value::from(*number),
        Json::Large(number) => Value::from(*number),
        Json::Double(number) => Number::from_f64(*number).map_or(Value::Null, Value::Number),
        Json::Text(Text::Word(index)) => Value::from(WORDS[usize::from(*index) % WORDS.len()]),
        Json::Text(Text::Base64(bytes)) => {
            Value::from(bytes.iter().map(|byte| char::from(b'A' + byte % 26)).collect::<String>())
        }
        Json::Text(Text::Any(text)) => Value::from(text.as_str()),
        Json::List(elements) => elements.iter().map(value).collect(),
        Json::Object(found) => Value::Object(members(found)),
    }
}

fn members(found: &[(Name, Json)]) -> Map<String, Value> {
    let name = |name: &Name| match name {
        Name::Known(index) => NAMES[usize::from(*index) % NAMES.len()].to_owned(),
        Name::Any(text) => text.clone(),
    };
    found.iter().map(|(known, json)| (name(known), value(json))).collect()
}

fuzz_target!(|input: Vec<(Name, Json)>| {
    let arguments = members(&input);
    for command in COMMANDS {
        let read = |arguments: Map<String, Value>| command.read(Members::new(arguments));
        let once = read(arguments.clone());
        assert_eq!(once, read(arguments.clone()), "{} reads the same twice", command.name);
        if let Err(refusal) = &once {
            assert_eq!(refusal.class, Class::GenericError, "{}: {refusal}", command.name);
            assert!(refusal.desc.len() <= DESC_BYTES_MAX, "{}: {} bytes", command.name, refusal.desc.len());
            assert!(!refusal.desc.is_empty(), "{}", command.name);
        }
        let mut more = arguments.clone();
        // No command has an argument of this name.
        more.insert("never-an-argument".to_owned(), Value::Null);
        let refusal = read(more).expect_err("an unknown member is refused");
        if once.is_ok() {
            assert_eq!(refusal.desc, "Parameter 'never-an-argument' is unexpected", "{}", command.name);
        }
    }
});
