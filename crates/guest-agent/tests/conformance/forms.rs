//! The commands and the forms of their arguments, from which wrong requests are made.

use serde_json::{Value, json};

/// What an argument has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Int,
    Bool,
    Text,
    Texts,
    Objects,
    /// A truth value or a name.
    Capture,
    /// A number or a name.
    Whence,
}

/// An argument: name, what it is, whether it must be there, and a value that does nothing.
pub(crate) type Argument = (&'static str, Kind, bool, &'static str);

/// A command and its arguments, in the order of QEMU's schema.
pub(crate) struct Form {
    pub(crate) command: &'static str,
    pub(crate) arguments: &'static [Argument],
}

/// All commands that take arguments, and some that take none. The given values are harmless even where all of them
/// together are right: no such handle, user, processor or mount point.
pub(crate) const FORMS: &[Form] = &[
    Form { command: "guest-sync-delimited", arguments: &[("id", Kind::Int, true, "5")] },
    Form { command: "guest-sync", arguments: &[("id", Kind::Int, true, "5")] },
    Form { command: "guest-ping", arguments: &[] },
    Form { command: "guest-get-time", arguments: &[] },
    Form { command: "guest-set-time", arguments: &[("time", Kind::Int, false, "-5")] },
    Form { command: "guest-info", arguments: &[] },
    Form { command: "guest-shutdown", arguments: &[("mode", Kind::Text, false, r#""nothing""#)] },
    Form {
        command: "guest-file-open",
        arguments: &[("path", Kind::Text, true, r#""no/such""#), ("mode", Kind::Text, false, r#""r""#)],
    },
    Form { command: "guest-file-close", arguments: &[("handle", Kind::Int, true, "77")] },
    Form {
        command: "guest-file-read",
        arguments: &[("handle", Kind::Int, true, "77"), ("count", Kind::Int, false, "5")],
    },
    Form {
        command: "guest-file-write",
        arguments: &[
            ("handle", Kind::Int, true, "77"),
            ("buf-b64", Kind::Text, true, r#""eHg=""#),
            ("count", Kind::Int, false, "1"),
        ],
    },
    Form {
        command: "guest-file-seek",
        arguments: &[
            ("handle", Kind::Int, true, "77"),
            ("offset", Kind::Int, true, "0"),
            ("whence", Kind::Whence, true, "0"),
        ],
    },
    Form { command: "guest-file-flush", arguments: &[("handle", Kind::Int, true, "77")] },
    Form { command: "guest-fsfreeze-status", arguments: &[] },
    Form {
        command: "guest-fsfreeze-freeze-list",
        arguments: &[("mountpoints", Kind::Texts, false, r#"["/no/such"]"#)],
    },
    Form { command: "guest-fsfreeze-thaw", arguments: &[] },
    Form { command: "guest-fstrim", arguments: &[("minimum", Kind::Int, false, "0")] },
    Form { command: "guest-network-get-interfaces", arguments: &[] },
    Form { command: "guest-get-vcpus", arguments: &[] },
    Form {
        command: "guest-set-vcpus",
        arguments: &[("vcpus", Kind::Objects, true, r#"[{"logical-id": 4000, "online": true}]"#)],
    },
    Form { command: "guest-get-disks", arguments: &[] },
    Form { command: "guest-get-fsinfo", arguments: &[] },
    Form {
        command: "guest-set-user-password",
        arguments: &[
            ("username", Kind::Text, true, r#""no:such""#),
            ("password", Kind::Text, true, r#""eHg=""#),
            ("crypted", Kind::Bool, true, "false"),
        ],
    },
    Form { command: "guest-get-memory-blocks", arguments: &[] },
    Form {
        command: "guest-set-memory-blocks",
        arguments: &[("mem-blks", Kind::Objects, true, r#"[{"phys-index": 999999, "online": true}]"#)],
    },
    Form { command: "guest-get-memory-block-info", arguments: &[] },
    Form { command: "guest-exec-status", arguments: &[("pid", Kind::Int, true, "99999999")] },
    Form {
        command: "guest-exec",
        arguments: &[
            ("path", Kind::Text, true, r#""/no/such""#),
            ("arg", Kind::Texts, false, r#"["a"]"#),
            ("env", Kind::Texts, false, r#"["A=b"]"#),
            ("input-data", Kind::Text, false, r#""eHg=""#),
            ("capture-output", Kind::Capture, false, "true"),
        ],
    },
    Form { command: "guest-get-host-name", arguments: &[] },
    Form { command: "guest-get-users", arguments: &[] },
    Form { command: "guest-get-timezone", arguments: &[] },
    Form { command: "guest-get-osinfo", arguments: &[] },
    Form {
        command: "guest-ssh-get-authorized-keys",
        arguments: &[("username", Kind::Text, true, r#""no-such""#)],
    },
    Form {
        command: "guest-ssh-add-authorized-keys",
        arguments: &[
            ("username", Kind::Text, true, r#""no-such""#),
            ("keys", Kind::Texts, true, r#"["key"]"#),
            ("reset", Kind::Bool, false, "false"),
        ],
    },
    Form {
        command: "guest-ssh-remove-authorized-keys",
        arguments: &[
            ("username", Kind::Text, true, r#""no-such""#),
            ("keys", Kind::Texts, true, r#"["key"]"#),
        ],
    },
    Form { command: "guest-get-diskstats", arguments: &[] },
    Form { command: "guest-get-cpustats", arguments: &[] },
    Form { command: "guest-get-load", arguments: &[] },
    Form { command: "guest-network-get-route", arguments: &[] },
];

/// Values of every type, tried for every argument.
const VALUES: &[&str] = &[
    "null",
    "true",
    "false",
    "0",
    "1",
    "-1",
    "1.0",
    "1.5",
    "-0",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "-9223372036854775809",
    "18446744073709551615",
    "18446744073709551616",
    r#""""#,
    r#""x""#,
    r#""1""#,
    r#""true""#,
    r#""\u00e9\ud83d\ude00""#,
    r#""a\u0000b""#,
    "[]",
    "[1]",
    r#"["x", 1]"#,
    r#"[["x"]]"#,
    r#"[{}]"#,
    r#"[{"x": 1}]"#,
    "[null]",
    "{}",
    r#"{"x": 1}"#,
];

/// Values inside lists of objects.
const OBJECTS: &[&str] = &[
    r#"[{"logical-id": 0}]"#,
    r#"[{"online": true}]"#,
    r#"[{"logical-id": "0", "online": true}]"#,
    r#"[{"logical-id": 0, "online": 1}]"#,
    r#"[{"logical-id": 4000, "online": true, "can-offline": true}]"#,
    r#"[{"logical-id": 4000, "online": true, "x": 1}]"#,
    r#"[{"phys-index": 999999}]"#,
    r#"[{"phys-index": -1, "online": true}]"#,
    r#"[{"phys-index": 999999, "online": "yes"}]"#,
    r#"[{"phys-index": 999999, "online": true, "can-offline": false}]"#,
    r#"[{"phys-index": 999999, "online": true}, {"phys-index": 999998}]"#,
];

impl Kind {
    /// Whether a value would be taken, so that the command begins its work.
    fn takes(self, value: &Value) -> bool {
        match self {
            Kind::Int => value.is_i64(),
            Kind::Bool => value.is_boolean(),
            Kind::Text => value.is_string(),
            Kind::Texts => value.as_array().is_some_and(|all| all.iter().all(Value::is_string)),
            Kind::Objects => value.as_array().is_some_and(Vec::is_empty),
            Kind::Capture => value.is_boolean(),
            Kind::Whence => value.is_i64(),
        }
    }
}

/// Requests with wrong arguments, each with its command.
pub(crate) fn wrong() -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    for form in FORMS {
        let mut add = |arguments: &str| {
            let request = format!(r#"{{"execute": "{}", "arguments": {arguments}}}"#, form.command);
            all.push((form.command, request));
        };
        let given = |leave_out: Option<usize>, instead: Option<(usize, &str)>, extra: &str| {
            let members = form.arguments.iter().enumerate().filter(|(index, _)| Some(*index) != leave_out);
            let members = members.map(|(index, (name, _, _, value))| {
                let value = instead.filter(|(at, _)| *at == index).map_or(*value, |(_, value)| value);
                format!(r#""{name}": {value}"#)
            });
            let extra = (!extra.is_empty()).then(|| extra.to_owned());
            format!("{{{}}}", members.chain(extra).collect::<Vec<_>>().join(", "))
        };
        add(&given(None, None, r#""x": 1"#));
        add(&given(None, None, r#""": null"#));
        add(&given(None, None, r#""\u00e9\n": {}"#));
        add(r#"{"x": 1, "y": 2}"#);
        if !form.arguments.is_empty() {
            add("{}");
        }
        for (index, (_, kind, required, _)) in form.arguments.iter().enumerate() {
            if *required {
                add(&given(Some(index), None, ""));
                add(&given(Some(index), None, r#""x": 1"#));
            }
            let objects = if *kind == Kind::Objects { OBJECTS } else { &[] };
            for value in VALUES.iter().chain(objects) {
                let parsed = serde_json::from_str(value).unwrap_or_else(|_| json!(1e30));
                // What would be taken belongs to the scripts, which know what it does.
                if !kind.takes(&parsed) {
                    add(&given(None, Some((index, value)), ""));
                }
            }
        }
        let all_wrong: Vec<String> =
            form.arguments.iter().map(|(name, ..)| format!(r#""{name}": {{}}"#)).collect();
        if form.arguments.len() > 1 {
            add(&format!("{{{}}}", all_wrong.join(", ")));
        }
        for arguments in ["null", "1", "[]", r#""x""#, "true"] {
            add(arguments);
        }
    }
    all
}
