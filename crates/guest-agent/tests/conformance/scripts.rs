//! What takes several requests: files, programs, keys, users. Each script is played to both agents, from the same
//! beginning; what is of the moment (process ids, times) is taken out of the answers.

use super::compare::masked;
use super::peer::Peer;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// A script: the commands without which it is passed over, and the play.
pub(crate) struct Script {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [&'static str],
    pub(crate) play: fn(&mut Peer) -> Vec<Value>,
}

macro_rules! scripts {
    ($($name:ident: $needs:expr, $play:expr;)+) => {
        pub(crate) const SCRIPTS: &[Script] = &[$(Script { name: stringify!($name), needs: &$needs, play: $play }),+];
    };
}

/// Asks a list of requests one after the other.
fn ask(peer: &mut Peer, requests: &[(&str, Value)]) -> Vec<Value> {
    requests.iter().map(|(command, arguments)| peer.answer(command, arguments)).collect()
}

/// Runs a program to its end; the process id is taken out.
fn run(peer: &mut Peer, arguments: Value) -> Value {
    let begun = peer.answer("guest-exec", &arguments);
    let Some(pid) = begun["return"]["pid"].as_i64() else { return begun };
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let status = peer.answer("guest-exec-status", &json!({"pid": pid}));
        if status["return"]["exited"] != false {
            let again = peer.answer("guest-exec-status", &json!({"pid": pid}));
            return json!([status, again["error"]["class"]]);
        }
        assert!(Instant::now() < deadline, "{}: {arguments} does not end", peer.name);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "arg": ["-c", script], "capture-output": true})
}

fn fed(base64: &str) -> Value {
    json!({"path": "/bin/cat", "input-data": base64, "capture-output": true})
}

/// A handle is the answer's number.
fn open(peer: &mut Peer, path: &str, mode: &str) -> (Value, i64) {
    let answer = peer.answer("guest-file-open", &json!({"path": path, "mode": mode}));
    let handle = answer["return"].as_i64().unwrap_or(-1);
    (answer, handle)
}

fn work(peer: &Peer, name: &str) -> std::path::PathBuf {
    peer.folder.join("work").join(name)
}

fn mode_of(path: &Path) -> Value {
    fs::metadata(path).map_or(Value::Null, |found| json!(format!("{:o}", found.permissions().mode())))
}

const FILES: [&str; 6] = [
    "guest-file-open",
    "guest-file-close",
    "guest-file-read",
    "guest-file-write",
    "guest-file-seek",
    "guest-file-flush",
];

scripts! {
    a_file_is_written_sought_and_read: FILES, |peer| {
        let (opened, file) = open(peer, "one", "w+");
        let mut all = vec![opened];
        all.extend(ask(peer, &[
            ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode("hello world\n")})),
            ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode("twice"), "count": 3})),
            ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode("twice"), "count": 6})),
            ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode("twice"), "count": -1})),
            ("guest-file-write", json!({"handle": file, "buf-b64": "", "count": 0})),
            ("guest-file-write", json!({"handle": file, "buf-b64": "&&&&"})),
            ("guest-file-flush", json!({"handle": file})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": 1})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": "set"})),
            ("guest-file-read", json!({"handle": file, "count": 5})),
            ("guest-file-read", json!({"handle": file, "count": 0})),
            ("guest-file-read", json!({"handle": file})),
            ("guest-file-read", json!({"handle": file})),
            ("guest-file-seek", json!({"handle": file, "offset": -4, "whence": "end"})),
            ("guest-file-read", json!({"handle": file, "count": 2})),
            ("guest-file-seek", json!({"handle": file, "offset": -1, "whence": "cur"})),
            ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode("Z")})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": 0})),
            ("guest-file-read", json!({"handle": file, "count": 100})),
            ("guest-file-seek", json!({"handle": file, "offset": -1, "whence": 0})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": 3})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": "middle"})),
            ("guest-file-seek", json!({"handle": file, "offset": 1000, "whence": 2})),
            ("guest-file-read", json!({"handle": file})),
            ("guest-file-read", json!({"handle": file, "count": -1})),
            ("guest-file-read", json!({"handle": file, "count": 50_331_649})),
            ("guest-file-close", json!({"handle": file})),
            ("guest-file-close", json!({"handle": file})),
            ("guest-file-read", json!({"handle": file})),
            ("guest-file-write", json!({"handle": file, "buf-b64": ""})),
            ("guest-file-flush", json!({"handle": file})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": 0})),
        ]));
        all.push(json!(fs::read_to_string(work(peer, "one")).unwrap()));
        all.push(mode_of(&work(peer, "one")));
        all
    };

    every_mode_opens_or_is_refused: FILES, |peer| {
        let mut all = Vec::new();
        for mode in ["r", "w", "a", "rb", "wb", "ab", "r+", "w+", "a+", "r+b", "w+b", "a+b", "rb+", "wb+", "ab+", "",
            "x", "zz", "rw", "R", "r ", "w+x", "re"] {
            for path in ["there", "not-there", ".", "", "no/such", "there/x", "/"] {
                fs::write(work(peer, "there"), "12345").unwrap();
                let _removed = fs::remove_file(work(peer, "not-there")).is_ok();
                let (mut opened, file) = open(peer, path, mode);
                // The number of the handle depends on how many opened before: compared in another script.
                if file >= 0 {
                    opened = json!("opened");
                }
                all.push(json!([mode, path, opened]));
                if file >= 0 {
                    all.extend(ask(peer, &[
                        ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode("ab")})),
                        ("guest-file-flush", json!({"handle": file})),
                        ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": 0})),
                        ("guest-file-read", json!({"handle": file, "count": 3})),
                        ("guest-file-close", json!({"handle": file})),
                    ]));
                }
                all.push(json!(fs::read_to_string(work(peer, "there")).unwrap()));
                all.push(mode_of(&work(peer, "not-there")));
            }
        }
        all
    };

    handles_count_up: FILES, |peer| {
        let (_, first) = open(peer, "a", "w");
        let (_, second) = open(peer, "b", "w");
        let closed = ask(peer, &[("guest-file-close", json!({"handle": first}))]);
        let (_, third) = open(peer, "a", "w");
        let end = ask(peer, &[
            ("guest-file-close", json!({"handle": second})),
            ("guest-file-close", json!({"handle": third})),
            ("guest-file-close", json!({"handle": 0})),
            ("guest-file-close", json!({"handle": -1})),
            ("guest-file-close", json!({"handle": i64::MAX})),
        ]);
        let steps = vec![json!(second - first), json!(third - second)];
        [steps, closed, end].concat()
    };

    large_pieces_come_back_whole: FILES, |peer| {
        let piece: Vec<u8> = (0..3_000_000u32).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect();
        let (_, file) = open(peer, "large", "w+");
        let mut all = ask(peer, &[
            ("guest-file-write", json!({"handle": file, "buf-b64": STANDARD.encode(&piece)})),
            ("guest-file-seek", json!({"handle": file, "offset": 0, "whence": 0})),
            ("guest-file-read", json!({"handle": file, "count": 1 << 20})),
            ("guest-file-read", json!({"handle": file, "count": 3 << 20})),
            ("guest-file-close", json!({"handle": file})),
        ]);
        all.push(json!(fs::read(work(peer, "large")).unwrap() == piece));
        all
    };

    base64_is_read_as_stock_reads_it: FILES, |peer| {
        let mut all = Vec::new();
        for text in ["", "=", "==", "====", "QQ==", "QQ=", "QQ", "Q", "QUI=", "QUJD", "QUJDRA==", "QU\nJD", "QUJD\n", " QUJD",
            "QU JD", "QUJD QUJD", "QQ==QQ==", "QUJD=", "-_-_", "é", "QUJD\u{0}", "QQ==x", "=QUJ"] {
            let (_, file) = open(peer, "base64", "w");
            all.push(json!([text, peer.answer("guest-file-write", &json!({"handle": file, "buf-b64": text}))]));
            all.extend(ask(peer, &[("guest-file-close", json!({"handle": file}))]));
            all.push(json!(fs::read(work(peer, "base64")).unwrap()));
        }
        all
    };

    programs_run_and_tell_their_end: ["guest-exec", "guest-exec-status"], |peer| {
        fs::write(work(peer, "not-executable"), "x").unwrap();
        let mut all = Vec::new();
        for arguments in [
            json!({"path": "/bin/sh", "arg": ["-c", "exit 3"]}),
            json!({"path": "sh", "arg": ["-c", "exit 0"]}),
            json!({"path": "/bin/sh", "arg": ["-c", "kill -9 $$"]}),
            json!({"path": "/bin/sh", "arg": ["-c", "kill -15 $$"], "capture-output": true}),
            shell("echo out; echo err >&2"),
            shell("exit 255"),
            shell(""),
            shell("printf '\\377\\000x'"),
            shell("echo $0 $# \"$@\""),
            shell("cat; echo done"),
            json!({"path": "/bin/sh", "arg": ["-c", "cat"], "input-data": STANDARD.encode("in\n"), "capture-output": true}),
            json!({"path": "/bin/sh", "arg": ["-c", "cat"], "input-data": "", "capture-output": true}),
            fed("aW4"),
            fed("aW4="),
            fed("aW4=aW4="),
            fed("aW\n4K\n"),
            fed("aW4=K"),
            fed("===="),
            fed("a=W4"),
            fed("aW4 "),
            fed("aW4-"),
            fed("\u{e9}"),
            json!({"path": "/bin/sh", "arg": ["-c", "echo $A $PATH"], "env": ["A=b c", "PATH=/bin"], "capture-output": true}),
            json!({"path": "/bin/sh", "arg": ["-c", "echo ${A-unset}"], "env": [], "capture-output": true}),
            json!({"path": "/bin/sh", "arg": ["-c", "pwd; umask"], "capture-output": false}),
            json!({"path": "/no/such"}),
            json!({"path": "no-such"}),
            json!({"path": ""}),
            json!({"path": "/"}),
            json!({"path": "not-executable"}),
            json!({"path": "./not-executable"}),
            json!({"path": "/bin/sh", "arg": ["-c", "x"], "input-data": "&"}),
            json!({"path": "\u{e9}"}),
        ] {
            all.push(json!([arguments.clone(), run(peer, arguments)]));
        }
        all
    };

    output_beyond_the_limit_is_cut: ["guest-exec", "guest-exec-status"], |peer| {
        let mut status = run(peer, shell("head -c 17000000 /dev/zero; echo err >&2"));
        let length = status[0]["return"]["out-data"].as_str().map(str::len);
        status[0]["return"]["out-data"] = json!(length);
        vec![status]
    };

    the_capture_modes_that_work_in_stock: ["guest-exec", "guest-exec-status", "guest-get-load"], |peer| {
        let script = "echo out; echo err >&2";
        ["none", "separated", "merged"].iter().map(|mode| {
            run(peer, json!({"path": "/bin/sh", "arg": ["-c", script], "capture-output": mode}))
        }).collect()
    };

    keys_are_added_and_removed: ["guest-ssh-get-authorized-keys", "guest-ssh-add-authorized-keys", "guest-ssh-remove-authorized-keys"], |peer| {
        let _removed = fs::remove_dir_all("/home/u/.ssh").is_ok();
        let add = |keys: Value| ("guest-ssh-add-authorized-keys", json!({"username": "u", "keys": keys}));
        let remove = |keys: Value| ("guest-ssh-remove-authorized-keys", json!({"username": "u", "keys": keys}));
        let get = || ("guest-ssh-get-authorized-keys", json!({"username": "u"}));
        let mut all = ask(peer, &[
            get(),
            add(json!(["key1", "key2"])),
            get(),
            add(json!(["key2", "key3"])),
            get(),
            remove(json!(["key1", "nope"])),
            get(),
            add(json!(["# comment"])),
            add(json!(["a\nb"])),
            add(json!([""])),
            get(),
            add(json!([])),
        ]);
        all.push(json!(fs::read_to_string("/home/u/.ssh/authorized_keys").ok()));
        all.push(mode_of(Path::new("/home/u/.ssh")));
        all.push(mode_of(Path::new("/home/u/.ssh/authorized_keys")));
        all.extend(ask(peer, &[
            ("guest-ssh-add-authorized-keys", json!({"username": "u", "keys": ["only"], "reset": true})),
            get(),
            ("guest-ssh-add-authorized-keys", json!({"username": "u", "keys": [], "reset": true})),
            get(),
        ]));
        fs::write("/home/u/.ssh/authorized_keys", "one\n# remark\n\n  two  \nthree").unwrap();
        all.extend(ask(peer, &[get(), remove(json!(["one"]))]));
        all.push(json!(fs::read_to_string("/home/u/.ssh/authorized_keys").ok()));
        all
    };

    passwords_reach_chpasswd: ["guest-set-user-password"], |peer| {
        let mut all = Vec::new();
        for (user, password, crypted) in [
            ("u", STANDARD.encode("secret"), false),
            ("u", STANDARD.encode("$6$x$y"), true),
            ("u", STANDARD.encode(""), false),
            ("u", STANDARD.encode("a\nb"), false),
            ("u\nv", STANDARD.encode("x"), false),
            ("u:v", STANDARD.encode("x"), false),
            ("", STANDARD.encode("x"), false),
            ("u", "&".to_owned(), false),
            ("u", STANDARD.encode("a:b"), false),
            ("fails", STANDARD.encode("x"), false),
        ] {
            let _removed = fs::remove_file("/run/called").is_ok();
            let arguments = json!({"username": user, "password": password, "crypted": crypted});
            all.push(json!([user, password, peer.answer("guest-set-user-password", &arguments)]));
            all.push(json!(fs::read_to_string("/run/called").ok()));
        }
        all
    };

    shutting_down_calls_the_systems_programs: ["guest-shutdown"], |peer| {
        let mut all = Vec::new();
        for arguments in [json!({}), json!({"mode": "powerdown"}), json!({"mode": "halt"}), json!({"mode": "reboot"})] {
            let _removed = fs::remove_file("/run/called").is_ok();
            // Success is not answered: what comes next is the marker's own line.
            let request = json!({"execute": "guest-shutdown", "arguments": arguments}).to_string();
            let lines = peer.hear(&[request.into_bytes()], 0);
            all.push(json!([arguments, lines.len(), fs::read_to_string("/run/called").ok()]));
        }
        for mode in ["", "off", "HALT"] {
            all.push(peer.answer("guest-shutdown", &json!({"mode": mode})));
        }
        all
    };

    the_clock_is_not_set_without_the_right_to_it: ["guest-set-time"], |peer| {
        ask(peer, &[
            ("guest-set-time", json!({"time": 1_700_000_000_000_000_000_i64})),
            ("guest-set-time", json!({"time": -1})),
            ("guest-set-time", json!({"time": i64::MAX})),
        ])
    };

    what_there_is_none_of_cannot_be_changed: ["guest-set-vcpus", "guest-set-memory-blocks"], |peer| {
        ask(peer, &[
            ("guest-set-vcpus", json!({"vcpus": []})),
            ("guest-set-vcpus", json!({"vcpus": [{"logical-id": 4000, "online": true}]})),
            ("guest-set-vcpus", json!({"vcpus": [{"logical-id": 0, "online": true}]})),
            ("guest-set-vcpus", json!({"vcpus": [{"logical-id": -1, "online": true}]})),
            ("guest-set-vcpus", json!({"vcpus": [{"logical-id": 0, "online": true, "can-offline": true}]})),
            ("guest-set-memory-blocks", json!({"mem-blks": []})),
            ("guest-set-memory-blocks", json!({"mem-blks": [{"phys-index": 999_999, "online": true}]})),
        ])
    };

    numbers_of_the_moment_have_the_same_shape: ["guest-get-cpustats", "guest-get-diskstats"], |peer| {
        ask(peer, &[("guest-get-cpustats", json!({})), ("guest-get-diskstats", json!({}))]).into_iter().map(masked).collect()
    };
}
