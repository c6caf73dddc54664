//! What an NBD client sends. The server never lets it write, reads nothing outside the disk, waits for no more than
//! its limits, and its answers stay in proportion to what was asked.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nbd::{
    Command, Decoded, Export, RequestDecoder, ServerHandshake, ServerSession, ServerStep, allocation_status,
    limits, split_at_holes,
};

#[derive(Arbitrary, Debug)]
enum Sent {
    Raw(Vec<u8>),
    Flags(u8),
    Option { number: u8, data: Vec<u8> },
    Named { number: u8, export: u8, contexts: Vec<u8> },
    Request { command: u8, flags: u8, offset: u64, length: u32 },
    SmallRequest { command: u8, flags: u8, offset: u16, length: u16 },
}

#[derive(Arbitrary, Debug)]
struct Input {
    sent: Vec<Sent>,
    cuts: Vec<u8>,
    extents: Vec<(u64, bool)>,
}

const DISK_BYTES: u64 = 64 << 10;
const NAMES: [&str; 3] = ["sda", "", "gone"];
const CONTEXTS: [&str; 4] = ["base:allocation", "qemu:dirty-bitmap:b0", "base:", "other"];

fn counted(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).expect("a short text").to_be_bytes()[..], text.as_bytes()].concat()
}

fn option(number: u8, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("a fuzzer's input is short");
    [b"IHAVEOPT", &u32::from(number % 12).to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

fn request(command: u8, flags: u8, offset: u64, length: u32) -> Vec<u8> {
    let head = [&0x2560_9513_u32.to_be_bytes()[..], &u16::from(flags % 32).to_be_bytes()].concat();
    let tail = [&7u64.to_be_bytes()[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat();
    [head, u16::from(command % 10).to_be_bytes().to_vec(), tail].concat()
}

fn bytes(sent: &Sent) -> Vec<u8> {
    match sent {
        Sent::Raw(raw) => raw.clone(),
        Sent::Flags(flags) => vec![0, 0, 0, flags % 8],
        Sent::Option { number, data } => option(*number, data),
        Sent::Named { number, export, contexts } => {
            let export = NAMES[usize::from(*export) % NAMES.len()];
            let mut data = counted(export);
            match number % 12 {
                // EXPORT_NAME has the bare name; INFO and GO a list of 16-bit numbers, META_CONTEXT one of names.
                1 => data = export.as_bytes().to_vec(),
                6 | 7 => {
                    data.extend(u16::try_from(contexts.len()).unwrap_or(0).to_be_bytes());
                    data.extend(contexts.iter().flat_map(|number| u16::from(*number % 5).to_be_bytes()));
                }
                _ => {
                    data.extend(u32::try_from(contexts.len()).unwrap_or(0).to_be_bytes());
                    data.extend(contexts.iter().flat_map(|at| counted(CONTEXTS[usize::from(*at) % 4])));
                }
            }
            option(*number, &data)
        }
        Sent::Request { command, flags, offset, length } => request(*command, *flags, *offset, *length),
        Sent::SmallRequest { command, flags, offset, length } => {
            request(*command, *flags, u64::from(*offset), u32::from(*length))
        }
    }
}

/// The server's whole life with this client; how many requests it judged.
fn serve(stream: &[u8], cuts: &[u8], extents: &[(u64, bool)]) -> (Vec<u8>, usize) {
    let exports = [Export {
        name: "sda".to_owned(),
        size_bytes: DISK_BYTES,
        flags: 3,
        contexts: CONTEXTS[..2].iter().map(|&name| name.to_owned()).collect(),
        preferred_bytes: 4096,
    }];
    let mut out = Vec::new();
    let mut handshake = ServerHandshake::new(&mut out);
    let mut session: Option<ServerSession> = None;
    let mut requests = RequestDecoder::new();
    let mut judged = 0;
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut) + 1);
    let (mut start, mut end) = (0, 0);
    loop {
        let shown = &stream[start..end];
        let decoded = match &session {
            None => match handshake.decode(shown, &exports, &mut out) {
                Err(_) | Ok(Decoded::Ready(_, ServerStep::Abort)) => return (out, judged),
                Ok(Decoded::More(more)) => Err(more),
                Ok(Decoded::Ready(consumed, step)) => {
                    if let ServerStep::Done(agreed) = step {
                        assert_eq!((agreed.export, agreed.size_bytes), (0, DISK_BYTES));
                        session = Some(agreed);
                    }
                    Ok(consumed)
                }
            },
            Some(session) => match requests.decode(shown) {
                Err(_) => return (out, judged),
                Ok(Decoded::More(more)) => Err(more),
                Ok(Decoded::Ready(consumed, request)) => {
                    judged += usize::from(request.is_some());
                    request.into_iter().for_each(|request| carry_out(session, &request, extents));
                    Ok(consumed)
                }
            },
        };
        match decoded {
            Ok(consumed) => {
                assert!(consumed > 0 && consumed <= end - start);
                start += consumed;
            }
            Err(more) => {
                assert!(more > end - start && more <= 16 + limits::OPTION_BYTES_MAX);
                if end == stream.len() {
                    return (out, judged);
                }
                end += cuts.next().unwrap_or(usize::MAX).min(stream.len() - end);
            }
        }
    }
}

fn carry_out(session: &ServerSession, request: &nbd::Request, extents: &[(u64, bool)]) {
    match session.judge(request) {
        Err(_) => {}
        Ok(Command::Read { offset, length, .. }) => {
            assert!(request.command == 0 && length > 0 && offset + u64::from(length) <= DISK_BYTES);
            let mut at = offset;
            for piece in split_at_holes(offset, length, extents, 4096) {
                assert!(piece.offset == at && piece.length > 0);
                at += u64::from(piece.length);
            }
            assert_eq!(at, offset + u64::from(length), "a read is answered whole");
        }
        Ok(Command::BlockStatus { offset, length, one }) => {
            assert!(request.command == 7 && length > 0 && offset + u64::from(length) <= DISK_BYTES);
            let status = allocation_status(length, extents, one);
            assert!(!status.is_empty() && status.iter().all(|(length, _)| *length > 0));
            assert!(!one || (status.len() == 1 && status[0].0 <= length));
        }
        Ok(Command::Flush) => assert_eq!(request.command, 3),
        Ok(Command::Disconnect) => assert_eq!(request.command, 2),
    }
}

fuzz_target!(|input: Input| {
    let stream: Vec<u8> = input.sent.iter().flat_map(bytes).collect();
    let whole = serve(&stream, &[], &input.extents);
    assert_eq!(whole, serve(&stream, &input.cuts, &input.extents), "it depends on how the bytes arrive");
    assert!(whole.0.len() <= 64 + 8 * stream.len() + 256 * input.sent.len(), "answers out of proportion");
});
