//! What an NBD server sends. The client takes nothing that it did not ask for, never twice, waits for no more than
//! its limits, and calls a read finished only when all of it has come; in the handshake it gets on or gives up.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nbd::{
    Body, ClientHandshake, ClientTransmission, Decoded, ErrorCode, Session, encode_data_header, encode_done,
    encode_error, encode_hole, encode_simple, encode_status, limits,
};
use std::collections::BTreeMap;

#[derive(Arbitrary, Debug)]
enum Reply {
    Raw(Vec<u8>),
    Data { cookie: u8, offset: u16, length: u8, last: bool },
    Hole { cookie: u8, offset: u16, length: u16, last: bool },
    Status { cookie: u8, context: u8, extents: Vec<(u32, u32)>, last: bool },
    Error { cookie: u8, code: u32, message: String, offset: Option<u64> },
    Done { cookie: u8 },
    Simple { cookie: u8, code: Option<u32>, data: u8 },
}

#[derive(Arbitrary, Debug)]
enum Option_ {
    Raw(Vec<u8>),
    Reply { option: u8, kind: u8, error: bool, data: Vec<u8> },
    Export { size_bytes: u64, flags: u16 },
    BlockSize { minimum: u32, preferred: u32, maximum: u32 },
    Context { number: u32, name: u8 },
}

#[derive(Arbitrary, Debug)]
enum Input {
    Handshake { greet: bool, list: bool, replies: Vec<Option_> },
    Transmission { structured: bool, requests: Vec<(bool, u16, u8)>, replies: Vec<Reply>, cuts: Vec<u8> },
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    let length = u32::try_from(data.len()).expect("a fuzzer's input is short");
    [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn handshake(greet: bool, list: bool, replies: &[Option_]) {
    let mut stream = if greet { b"NBDMAGICIHAVEOPT\x00\x03".to_vec() } else { Vec::new() };
    for reply in replies {
        stream.extend(match reply {
            Option_::Raw(raw) => raw.clone(),
            Option_::Reply { option, kind, error, data } => {
                let kind = u32::from(kind % 10) | if *error { 1 << 31 } else { 0 };
                option_reply(u32::from(option % 12), kind, data)
            }
            Option_::Export { size_bytes, flags } => {
                option_reply(7, 3, &[&[0, 0][..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat())
            }
            Option_::BlockSize { minimum, preferred, maximum } => {
                let sizes = [minimum, preferred, maximum].map(|size| size.to_be_bytes()).concat();
                option_reply(7, 3, &[&[0, 3][..], &sizes].concat())
            }
            Option_::Context { number, name } => {
                let name = ["base:allocation", "qemu:dirty-bitmap:b0", "x"][usize::from(name % 3)];
                option_reply(10, 4, &[&number.to_be_bytes()[..], name.as_bytes()].concat())
            }
        });
    }
    let client = if list {
        ClientHandshake::list_contexts("sda")
    } else {
        ClientHandshake::open("sda", &["base:allocation", "qemu:dirty-bitmap:b0"])
    };
    let mut client = client.expect("short names");
    let (mut out, mut rest) = (Vec::new(), &stream[..]);
    loop {
        match client.decode(rest, &mut out) {
            Err(_) => break,
            Ok(Decoded::More(more)) => {
                assert!(more > rest.len() && more <= 20 + limits::OPTION_BYTES_MAX);
                break;
            }
            Ok(Decoded::Ready(consumed, session)) => {
                assert!(consumed > 0);
                rest = &rest[consumed..];
                if let Some(session) = session {
                    assert!(session.size_bytes <= limits::DISK_BYTES_MAX);
                    assert!(session.contexts.len() <= if list { limits::CONTEXTS_LISTED_MAX } else { 2 });
                    break;
                }
            }
        }
    }
    assert!(out.len() < 1000, "the client says little");
}

fn transmission(structured: bool, requests: &[(bool, u16, u8)], replies: &[Reply], cuts: &[u8]) {
    let contexts = vec![(5, "base:allocation".to_owned()), (6, "qemu:dirty-bitmap:b0".to_owned())];
    let session = Session { size_bytes: 1 << 15, flags: 1, structured, read_bytes_max: 1 << 20, contexts };
    let mut client = ClientTransmission::new(session);
    let mut asked: BTreeMap<u64, (u64, u64, bool)> = BTreeMap::new();
    let mut out = Vec::new();
    for (read, offset, length) in requests {
        let (offset, length) = (u64::from(*offset), u32::from(*length) * 16);
        let cookie = if *read {
            client.read(offset, length, &mut out)
        } else {
            client.block_status(offset, length, &mut out)
        };
        if let Ok(cookie) = cookie {
            assert!(offset + u64::from(length) <= 1 << 15, "asked for what is not there");
            asked.insert(cookie, (offset, offset + u64::from(length), *read));
        }
    }
    let stream: Vec<u8> = replies.iter().flat_map(encode).collect();
    let mut filled: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
    let mut failed = Vec::new();
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut) + 1);
    let (mut start, mut end) = (0, 0);
    loop {
        let seen = match client.decode(&stream[start..end]) {
            Err(_) => return,
            Ok(Decoded::More(more)) => {
                assert!(more > end - start);
                assert!(more <= 36 + (1 << 20) + 8 * limits::STATUS_EXTENTS_MAX, "waits for {more} bytes");
                if end == stream.len() {
                    return;
                }
                end = (end + cuts.next().unwrap_or(usize::MAX).min(stream.len() - end)).min(stream.len());
                continue;
            }
            Ok(Decoded::Ready(consumed, reply)) => {
                assert!(consumed > 0 || matches!(reply.body, Body::Nothing));
                let (from, to, read) =
                    *asked.get(&reply.cookie).expect("an answer to nothing that was asked");
                let mut fill = |offset: u64, length: u64| {
                    assert!(read && length > 0 && offset >= from && offset + length <= to, "not asked for");
                    let parts = filled.entry(reply.cookie).or_default();
                    assert!(parts.iter().all(|part| offset >= part.1 || offset + length <= part.0), "twice");
                    parts.push((offset, offset + length));
                };
                match &reply.body {
                    Body::Data { offset, bytes } => fill(*offset, bytes.len() as u64),
                    Body::Hole { offset, length } => fill(*offset, u64::from(*length)),
                    Body::Status { extents, .. } => {
                        assert!(!read);
                        let mut at = from;
                        for extent in extents.clone() {
                            assert!(extent.offset == at && extent.length > 0 && extent.end() <= to);
                            at = extent.end();
                        }
                    }
                    Body::Failed { message, .. } => {
                        assert!(!message.chars().any(char::is_control));
                        failed.push(reply.cookie);
                    }
                    Body::Nothing => {}
                }
                if reply.finished {
                    asked.remove(&reply.cookie);
                    let parts = filled.remove(&reply.cookie).unwrap_or_default();
                    let got: u64 = parts.iter().map(|part| part.1 - part.0).sum();
                    assert!(
                        !read || failed.contains(&reply.cookie) || got == to - from,
                        "finished with a hole"
                    );
                }
                consumed
            }
        };
        start += seen;
        if seen == 0 {
            return;
        }
    }
}

fn encode(reply: &Reply) -> Vec<u8> {
    let mut out = Vec::new();
    let number = |cookie: &u8| u64::from(cookie % 12);
    match reply {
        Reply::Raw(raw) => out.clone_from(raw),
        Reply::Data { cookie, offset, length, last } => {
            let header =
                encode_data_header(number(cookie), u64::from(*offset), u32::from(*length) * 16, *last);
            out.extend(header.expect("a short chunk"));
            out.resize(out.len() + usize::from(*length) * 16, 0xAA);
        }
        Reply::Hole { cookie, offset, length, last } => {
            encode_hole(&mut out, number(cookie), u64::from(*offset), u32::from(*length), *last);
        }
        Reply::Status { cookie, context, extents, last } => {
            encode_status(&mut out, number(cookie), u32::from(context % 8), extents, *last);
        }
        Reply::Error { cookie, code, message, offset } => {
            encode_error(&mut out, number(cookie), ErrorCode(*code), message, *offset);
        }
        Reply::Done { cookie } => encode_done(&mut out, number(cookie)),
        Reply::Simple { cookie, code, data } => {
            out.extend(encode_simple(number(cookie), code.map(ErrorCode)));
            out.resize(out.len() + usize::from(*data) * 16, 0x55);
        }
    }
    out
}

fuzz_target!(|input: Input| match input {
    Input::Handshake { greet, list, replies } => handshake(greet, list, &replies),
    Input::Transmission { structured, requests, replies, cuts } => {
        transmission(structured, &requests, &replies, &cuts);
    }
});
