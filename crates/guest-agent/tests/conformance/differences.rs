//! Everything in which our answers differ from a stock agent's, each with its reason. What is not here must not differ,
//! and what is here must.

use super::compare::{Version, value};
use super::peer::{Line, contains};
use super::streams::Stream;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// A difference that is meant.
pub(crate) struct Difference {
    pub(crate) name: &'static str,
    pub(crate) why: &'static str,
    /// The runs that meet it, or it is out of date.
    pub(crate) met: fn(Run, Version) -> bool,
    pub(crate) between: Between,
}

/// What is compared in one run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    /// Answers to requests of every kind.
    Answers,
    /// What freezes do.
    Freezes,
}

/// Where it shows.
pub(crate) enum Between {
    /// In one answer: stock's, ours.
    Lines(fn(Version, &Stream, &Value, &Value) -> bool),
    /// In how many answers there are.
    Streams(fn(Version, &Stream, &[Line], &[Line]) -> bool),
    /// In one step of the named script.
    Steps(fn(Version, &str, &Value, &Value) -> bool),
}

/// The first version that counts lines and columns, and answers a broken message at the token that breaks it.
const NEW_PARSER: Version = (11, 0);

pub(crate) const DIFFERENCES: &[Difference] = &[
    Difference {
        name: "parse errors of the newest version",
        why: "ours are 11.1's: LINE:COL before them, and other words for some",
        met: |run, version| run == Run::Answers && version < NEW_PARSER,
        between: Between::Lines(|version, _, stock, ours| {
            version < NEW_PARSER
                && desc(ours).contains("JSON parse error, ")
                && newer_words(desc(stock)) == without_position(desc(ours))
                && same_id(stock, ours)
        }),
    },
    Difference {
        name: "a broken message is answered where it breaks",
        why: "as 11.1 does; versions before it answer at its end, once for everything in it",
        met: |run, version| run == Run::Answers && version < NEW_PARSER,
        between: Between::Streams(|version, _, stock, ours| {
            version < NEW_PARSER && {
                let errors = |lines: &[Line]| lines.iter().any(is_parse_error);
                let others = |lines: &[Line]| -> Vec<Option<Value>> {
                    lines.iter().filter(|line| !is_parse_error(line)).map(|line| value(line)).collect()
                };
                errors(stock) && errors(ours) && others(stock) == others(ours)
            }
        }),
    },
    Difference {
        name: "the column after a recovery",
        why: "stock counts the byte that ends a recovery twice where it is the next token's own",
        met: |run, version| run == Run::Answers && version >= NEW_PARSER,
        between: Between::Lines(|version, _, stock, ours| {
            let positions = (position(desc(stock)), position(desc(ours)));
            let (Some((line, column)), Some((our_line, our_column))) = positions else { return false };
            version >= NEW_PARSER
                && (line, column) == (our_line, our_column + 1)
                && without_position(desc(stock)) == without_position(desc(ours))
        }),
    },
    Difference {
        name: "beyond a limit the rest of the message is passed over",
        why: "as 11.1 does; versions before it read the rest as fresh input and answer the pieces",
        met: |run, version| run == Run::Answers && version < NEW_PARSER,
        between: Between::Streams(|version, _, stock, ours| {
            let limit = |lines: &[Line]| lines.iter().position(|line| contains(line, b" limit exceeded"));
            version < NEW_PARSER && limit(stock).is_some() && limit(stock) == limit(ours)
        }),
    },
    Difference {
        name: "an error's old frame",
        why: "7.2 puts what GLib says into a sentence of its own",
        met: |run, version| run == Run::Answers && version < (8, 0),
        between: Between::Steps(|version, _, stock, ours| {
            let inner = desc(&stock[1])
                .strip_prefix("Guest agent command failed, error was '")
                .and_then(|rest| rest.strip_suffix('\''));
            version < (8, 0) && inner == Some(desc(&ours[1]))
        }),
    },
    Difference {
        name: "more kinds of capture",
        why: "7.2 knows true and false only, and says so",
        met: |run, version| run == Run::Answers && version < (8, 0),
        between: Between::Lines(|version, _, stock, ours| {
            version < (8, 0)
                && desc(stock) == "Invalid parameter type for 'capture-output', expected: boolean"
                && desc(ours).contains("'capture-output'")
        }),
    },
    Difference {
        name: "what fsinfo lists",
        why: "since 9.1 each device once, and the size that root sees; 7.2 lists every mount, without that",
        met: |run, version| run == Run::Freezes && version < (9, 1),
        between: Between::Steps(|version, name, stock, ours| {
            let list = |step: &Value| step[1]["return"].as_array().cloned().unwrap_or_default();
            let same = |own: &Value| {
                list(stock).iter().any(|other| {
                    let mut own = own.clone();
                    own.as_object_mut().is_some_and(|own| own.remove("total-bytes-privileged").is_some())
                        && own == *other
                })
            };
            let devices =
                |step: &Value| list(step).iter().map(|one| one["name"].to_string()).collect::<BTreeSet<_>>();
            version < (9, 1)
                && name == "mounts"
                && stock[0] == "guest-get-fsinfo"
                && list(ours).iter().all(same)
                && devices(stock) == devices(ours)
        }),
    },
    Difference {
        name: "how a failed open is told",
        why: "11.1: Could not open 'X'; versions before it: open(\"X\")",
        met: |run, version| run == Run::Answers && version < NEW_PARSER,
        between: Between::Lines(|version, _, stock, ours| version < NEW_PARSER && newer_open(stock) == *ours),
    },
    Difference {
        name: "how a failed open is told in a script",
        why: "11.1: Could not open 'X'; versions before it: open(\"X\")",
        met: |run, version| run == Run::Answers && version < NEW_PARSER,
        between: Between::Steps(|version, _, stock, ours| version < NEW_PARSER && newer_open(stock) == *ours),
    },
    Difference {
        name: "what fstrim trims",
        why: "7.2 trims a device once for each of its mounts",
        met: |run, version| run == Run::Freezes && version < (9, 1),
        between: Between::Steps(|version, name, stock, ours| {
            let paths = |step: &Value| step[1]["return"]["paths"].as_array().cloned().unwrap_or_default();
            version < (9, 1)
                && name == "mounts"
                && stock[0] == "guest-fstrim"
                && paths(ours).len() < paths(stock).len()
                && paths(ours).iter().all(|path| paths(stock).contains(path))
        }),
    },
    Difference {
        name: "why a command is disabled",
        why: "7.2 says that the agent is in frozen state; the newest has one text for all reasons",
        met: |run, version| run == Run::Freezes && version < (8, 0),
        between: Between::Steps(|version, _, stock, ours| {
            version < (8, 0)
                && desc(&stock[2]).ends_with("has been disabled: the agent is in frozen state")
                && desc(&ours[2]).ends_with("has been disabled: the command is not allowed")
        }),
    },
    Difference {
        name: "what chpasswd said",
        why: "as 11.1: what a helper said ends the error; 7.2 throws it away",
        met: |run, version| run == Run::Answers && version < (9, 0),
        between: Between::Steps(|version, name, stock, ours| {
            version < (9, 0)
                && name == "passwords_reach_chpasswd"
                && desc(&ours[2]).strip_prefix(desc(&stock[2])).is_some_and(|said| said.starts_with(": "))
        }),
    },
    Difference {
        name: "no errno that nothing set",
        why: "stock ends the text with whatever went wrong before, if anything did",
        // Whether anything went wrong before is stock's own affair.
        met: |_, _| false,
        between: Between::Steps(|_, name, stock, ours| {
            name == "the_clock_is_not_set_without_the_right_to_it"
                && desc(ours) == "Invalid time"
                && desc(stock).starts_with("Invalid time: ")
        }),
    },
    Difference {
        name: "which program shuts down",
        why: "as 11.1: poweroff, halt or reboot where they are, shutdown(8) elsewhere; versions before it know only the latter",
        met: |run, version| run == Run::Answers && version < NEW_PARSER,
        between: Between::Steps(|version, name, stock, ours| {
            version < NEW_PARSER
                && name == "shutting_down_calls_the_systems_programs"
                && stock[2].as_str().is_some_and(|called| called.starts_with("/sbin/shutdown -h -"))
                && ours[2].as_str().is_some_and(|called| called.ends_with(" \n"))
                && (&stock[0], &stock[1]) == (&ours[0], &ours[1])
        }),
    },
    Difference {
        name: "any mount point of a file system freezes it",
        why: "D6: for versions since 10.0 only a device's first mount exists; asked for another they freeze nothing",
        met: |run, version| run == Run::Freezes && version >= (10, 0),
        between: Between::Steps(|version, name, stock, ours| {
            version >= (10, 0)
                && name == "freezes of /second alone"
                && stock[0] == ours[0]
                && [json!({"return": 0}), json!({"return": "thawed"})].contains(&stock[2])
                && [json!({"return": 1}), json!({"return": "frozen"})].contains(&ours[2])
        }),
    },
    Difference {
        name: "a process id is named",
        why: "D31: stock prints the format in place of the number, `PID ld does not exist`",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, _, stock, ours| {
            let number =
                desc(ours).strip_prefix("PID ").and_then(|rest| rest.strip_suffix(" does not exist"));
            // 7.2's text names the parameter.
            ["PID ld does not exist", "Invalid parameter 'pid'"].contains(&desc(stock))
                && number.is_some_and(|text| text.parse::<i64>().is_ok())
        }),
    },
    Difference {
        name: "another of several unknown members is named",
        why: "stock takes the first of its hash table",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, _, stock, ours| {
            let about = |text: &str| {
                let (head, rest) = text.split_once('\'')?;
                let (_, tail) = rest.rsplit_once('\'')?;
                Some(format!("{head}…{tail}"))
            };
            desc(ours).ends_with("is unexpected")
                && about(desc(stock)) == about(desc(ours))
                && same_id(stock, ours)
        }),
    },
    Difference {
        name: "another of several faults of a request is named",
        why: "stock looks at the members in the order of its hash table",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, _, stock, ours| {
            desc(stock).starts_with("QMP input ")
                && desc(ours).starts_with("QMP input ")
                && same_id(stock, ours)
        }),
    },
    Difference {
        name: "a wrong mode is told before an unknown member",
        why: "of two faults of guest-shutdown's arguments the other one is named",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, stream, stock, ours| {
            stream.command == Some("guest-shutdown")
                && desc(stock).ends_with("is unexpected")
                && desc(ours).starts_with("mode is invalid")
        }),
    },
    Difference {
        name: "output that is whole is not said to be",
        why: "stock says `out-truncated: false` beside the data; it is optional, and ours says only `true`",
        met: |run, _| run == Run::Answers,
        between: Between::Steps(|_, _, stock, ours| without_false(stock.clone()) == *ours),
    },
    Difference {
        name: "no infinity",
        why: "JSON has none: stock prints `inf`, which no host can read; ours is the largest double",
        met: |run, _| run == Run::Answers,
        between: Between::Streams(|_, stream, stock, ours| {
            let bytes = stream.pieces.concat();
            contains(&bytes, b"e999")
                && stock.len() == ours.len()
                && stock.iter().zip(ours).all(|(stock, ours)| {
                    let stock = String::from_utf8_lossy(stock).replace("inf", "1.7976931348623157e+308");
                    let error = |line: &[u8]| value(line).map(|one| without_position(desc(&one)).to_owned());
                    stock.as_bytes() == &ours[..]
                        || is_parse_error(ours) && error(stock.as_bytes()) == error(ours)
                })
        }),
    },
    Difference {
        name: "a disk's serial number without udev",
        why: "stock knows it only from udev's database, which is not there in the private root; ours reads the device's",
        // Not every machine's disks have one.
        met: |_, _| false,
        between: Between::Lines(|_, stream, stock, ours| {
            let mut same = ours.clone();
            let disks = same["return"].as_array_mut().into_iter().flatten();
            let addresses = disks.filter_map(|disk| disk.get_mut("address")?.as_object_mut());
            addresses.for_each(|address| drop(address.remove("serial")));
            stream.command == Some("guest-get-disks") && same == *stock
        }),
    },
    Difference {
        name: "single quotes in os-release",
        why: "os-release(5) allows them; stock leaves them in and cuts at the first blank",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, _, stock, ours| {
            let mut same = stock.clone();
            stock["return"]["pretty-name"] == "'of" && {
                same["return"]["pretty-name"] = "of words".into();
                same == *ours
            }
        }),
    },
    Difference {
        name: "bad UTF-8 in what an error repeats",
        why: "one replacement character for each byte that is wrong; stock counts overlong sequences as one",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, _, stock, ours| {
            let collapsed = |text: &str| {
                // The pair C0 80 is QEMU's way to write a NUL.
                let mut text = without_position(text).replace('\0', "\u{FFFD}");
                while text.contains("\u{FFFD}\u{FFFD}") {
                    text = text.replace("\u{FFFD}\u{FFFD}", "\u{FFFD}");
                }
                text
            };
            desc(ours).contains("stray '") && collapsed(desc(stock)) == collapsed(desc(ours))
        }),
    },
    Difference {
        name: "long foreign texts are cut",
        why: "an error repeats at most 1,024 bytes of what came, 256 of a bad token",
        met: |run, _| run == Run::Answers,
        between: Between::Lines(|_, stream, stock, ours| {
            stream.pieces.concat().len() > 256 && {
                let end =
                    |text: &str| text.char_indices().rev().take_while(|(_, c)| !c.is_alphanumeric()).last();
                let (ours, stock) = (without_position(desc(ours)), without_position(desc(stock)));
                let kept = end(ours).map_or(ours, |(at, _)| &ours[..at]);
                ours.len() > 200
                    && ours.len() < stock.len()
                    && stock.starts_with(kept.trim_end_matches(" has not been found").trim_end_matches('\''))
            }
        }),
    },
];

/// The value without `…-truncated: false`.
fn without_false(value: Value) -> Value {
    match value {
        Value::Array(elements) => elements.into_iter().map(without_false).collect(),
        Value::Object(members) => {
            let members = members
                .into_iter()
                .filter(|(name, member)| !name.ends_with("-truncated") || *member != false);
            members
                .map(|(name, member)| (name, without_false(member)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        }
        other => other,
    }
}

pub(crate) fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().unwrap_or_default()
}

fn same_id(stock: &Value, ours: &Value) -> bool {
    stock.get("id") == ours.get("id") && stock["error"]["class"] == ours["error"]["class"]
}

fn is_parse_error(line: &Line) -> bool {
    contains(line, b"JSON parse error, ")
}

fn without_position(text: &str) -> &str {
    match text.split_once(": JSON parse error, ") {
        Some((position, rest)) if position.bytes().all(|byte| byte.is_ascii_digit() || byte == b':') => {
            &text[text.len() - rest.len() - "JSON parse error, ".len()..]
        }
        _ => text,
    }
}

/// Line and column at which a parse error was seen.
fn position(text: &str) -> Option<(u64, u64)> {
    let (position, _) = text.split_once(": JSON parse error, ")?;
    let (line, column) = position.split_once(':')?;
    Some((line.parse().ok()?, column.parse().ok()?))
}

/// The answer with the text that 11.1 has for a file that does not open.
fn newer_open(answer: &Value) -> Value {
    let mut newer = answer.clone();
    let text = desc(answer).strip_prefix("open(\"").and_then(|rest| rest.split_once("\"): "));
    if let Some((path, reason)) = text {
        newer["error"]["desc"] = format!("Could not open '{path}': {reason}").into();
    }
    newer
}

/// What 11.1 says where versions before it say this.
fn newer_words(text: &str) -> &str {
    match text {
        "JSON parse error, missing : in object pair" => "JSON parse error, expecting ':'",
        "JSON parse error, expected separator in dict" => "JSON parse error, expected ',' or '}'",
        "JSON parse error, expected separator in list" => "JSON parse error, expected ',' or ']'",
        "JSON parse error, key is not a string in object" => "JSON parse error, expecting key",
        "JSON parse error, Missing value in dict" => "JSON parse error, expecting value",
        same => same,
    }
}
