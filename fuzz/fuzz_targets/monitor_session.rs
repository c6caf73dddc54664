//! What QEMU's monitor sends. However its bytes are cut, the same answers and events come out; and whatever an
//! answer to `query-block` and its like holds, deciding which disks count does not panic.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qmp::block::{Device, Node};
use qmp::export::Export;
use qmp::job::Job;
use qmp::machine::Stop;
use qmp::schema::{Entry, Schema};
use qmp::{Event, Session};
use serde_json::Value;
use std::collections::BTreeSet;
use vm::disks::DeviceFacts;

#[derive(Arbitrary, Debug)]
enum Sent {
    Raw(Vec<u8>),
    Greeting(u8),
    Event(String),
    Return { id: u8, value: String },
    Error { id: Option<u8>, desc: String },
}

#[derive(Arbitrary, Debug)]
struct Input {
    sent: Vec<Sent>,
    cuts: Vec<u8>,
    requests: u8,
    abandoned: u8,
}

fn bytes(sent: &[Sent]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sent in sent {
        match sent {
            Sent::Raw(raw) => bytes.extend_from_slice(raw),
            Sent::Greeting(major) => bytes.extend(
                format!(r#"{{"QMP": {{"version": {{"qemu": {{"major": {major}}}, "package": ""}}}}}}"#)
                    .bytes(),
            ),
            Sent::Event(name) => {
                let name = serde_json::to_string(name).expect("a text is JSON");
                bytes.extend(format!(r#"{{"event": {name}, "data": {{}}}}"#).bytes());
            }
            Sent::Return { id, value } => {
                bytes.extend(format!(r#"{{"return": {value}, "id": {}}}"#, id % 10).bytes());
            }
            Sent::Error { id, desc } => {
                let desc = serde_json::to_string(desc).expect("a text is JSON");
                let id = id.map_or_else(String::new, |id| format!(r#", "id": {}"#, id % 10));
                bytes.extend(
                    format!(r#"{{"error": {{"class": "GenericError", "desc": {desc}}}{id}}}"#).bytes(),
                );
            }
        }
        bytes.push(b'\n');
    }
    bytes
}

type Heard = (bool, Vec<Option<Result<Value, String>>>, Vec<Event>);

fn converse(stream: &[u8], cuts: &[u8], requests: u8, abandoned: u8) -> Heard {
    let mut session = Session::new();
    let ids: Vec<_> =
        (0..requests % 8).map(|_| session.request(&Stop {}).expect("`stop` has no arguments").0).collect();
    let abandoned = ids.get(usize::from(abandoned)).copied();
    abandoned.into_iter().for_each(|id| session.abandon(id));
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut) + 1);
    let mut rest = stream;
    let mut understood = true;
    while !rest.is_empty() && understood {
        let (piece, after) = rest.split_at(cuts.next().unwrap_or(usize::MAX).min(rest.len()));
        rest = after;
        understood = session.receive(piece).is_ok();
    }
    let answers = ids
        .iter()
        .map(|id| session.take_answer(*id).map(|answer| answer.map_err(|error| error.desc)))
        .collect();
    assert!(abandoned.is_none_or(|id| session.take_answer(id).is_none()));
    (understood, answers, std::iter::from_fn(|| session.take_event()).collect())
}

/// Which drives count, if the answer is a list of them: names are unique, whatever QEMU says.
fn decide(value: &Value) {
    if let Ok(devices) = serde_json::from_value::<Vec<Device>>(value.clone()) {
        let kinds = ["virtio-blk-device", "scsi-hd", "scsi-cd", "cfi.pflash01"];
        let facts = devices.iter().filter_map(|device| device.qdev.as_ref()).zip(kinds.iter().cycle());
        let facts = facts.map(|(qdev, kind)| {
            let path = vm::disks::device_path(qdev);
            (qdev.clone(), DeviceFacts { path, kind: (*kind).to_owned(), ..DeviceFacts::default() })
        });
        let drives = vm::disks::decide(&devices, &facts.collect());
        let disks = drives.disks.iter().map(|disk| &disk.name);
        let names: BTreeSet<_> = disks.chain(drives.left_out.iter().map(|left| &left.name)).collect();
        assert_eq!(names.len(), devices.len(), "two drives with one name");
    }
    let _read = (
        serde_json::from_value::<Vec<Node>>(value.clone()).is_ok(),
        serde_json::from_value::<Vec<Export>>(value.clone()).is_ok(),
        serde_json::from_value::<Vec<Job>>(value.clone()).is_ok(),
        serde_json::from_value::<Vec<Entry>>(value.clone()).map(Schema::new).is_ok(),
    );
}

fuzz_target!(|input: Input| {
    let stream = bytes(&input.sent);
    let whole = converse(&stream, &[], input.requests, input.abandoned);
    let cut = converse(&stream, &input.cuts, input.requests, input.abandoned);
    assert_eq!(whole, cut, "it depends on how the bytes arrive");
    whole.1.iter().flatten().flatten().for_each(decide);
});
