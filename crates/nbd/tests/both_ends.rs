//! Client and server codec against each other, through every way of cutting the byte stream.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use nbd::{
    Body, ClientHandshake, ClientTransmission, Command, Decoded, ErrorCode, Export, HandshakeError, Reply,
    RequestDecoder, ServerHandshake, ServerSession, ServerStep, Session, encode_data_header, encode_done,
    encode_error, encode_hole, encode_simple, encode_status, split_at_holes, transmission_flags,
};
use proptest::prelude::*;

const DISK_BYTES: u32 = 64 << 10;

fn exports() -> Vec<Export> {
    let export = |name: &str, contexts: &[&str]| Export {
        name: name.to_owned(),
        size_bytes: u64::from(DISK_BYTES),
        flags: transmission_flags::HAS_FLAGS | transmission_flags::READ_ONLY | transmission_flags::SEND_DF,
        contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
        preferred_bytes: 4096,
    };
    vec![export("plain", &[]), export("sda", &["base:allocation", "qemu:dirty-bitmap:b0", "qemu:other:x"])]
}

/// Shows a decoder a stream in pieces of the given sizes (then whole), as a socket would; collects what it says.
/// Ends early when the decoder fails (`None`).
fn feed<T>(
    stream: &[u8],
    cuts: &[usize],
    mut decode: impl FnMut(&[u8]) -> Option<Decoded<T>>,
) -> (Vec<T>, usize) {
    let mut said = Vec::new();
    let (mut start, mut end, mut wanted) = (0, 0, 1);
    let mut cuts = cuts.iter().copied();
    loop {
        while end - start >= wanted {
            match decode(&stream[start..end]) {
                None => return (said, start),
                Some(Decoded::More(more)) => {
                    assert!(more > end - start, "asked for what it had been shown");
                    wanted = more;
                }
                Some(Decoded::Ready(consumed, what)) => {
                    assert!(consumed > 0 && consumed <= end - start);
                    start += consumed;
                    wanted = 1;
                    said.push(what);
                }
            }
        }
        if end == stream.len() {
            return (said, start);
        }
        end = (end + cuts.next().unwrap_or(stream.len()).max(1)).min(stream.len());
    }
}

type Agreed = (Session, Option<ServerSession>);

/// Runs a handshake to its end, each flight of bytes cut into pieces.
fn shake_hands(
    mut client: ClientHandshake,
    exports: &[Export],
    cuts: &[usize],
) -> Result<Agreed, HandshakeError> {
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let mut server = ServerHandshake::new(&mut to_client);
    let mut agreed = None;
    for _ in 0..10 {
        let mut failure = None;
        let (sessions, _) = feed(&std::mem::take(&mut to_client), cuts, |bytes| {
            client.decode(bytes, &mut to_server).map_err(|error| failure = Some(error)).ok()
        });
        if let Some(error) = failure {
            return Err(error);
        }
        let (steps, _) = feed(&std::mem::take(&mut to_server), cuts, |bytes| {
            Some(server.decode(bytes, exports, &mut to_client).unwrap())
        });
        for step in steps {
            if let ServerStep::Done(session) = step {
                agreed = Some(session);
            }
        }
        if let Some(session) = sessions.into_iter().flatten().next() {
            return Ok((session, agreed));
        }
    }
    panic!("the handshake does not end");
}

fn open(export: &str, contexts: &[&str]) -> Result<Agreed, HandshakeError> {
    shake_hands(ClientHandshake::open(export, contexts).unwrap(), &exports(), &[])
}

#[test]
fn an_export_opens_with_the_contexts_asked_for_in_that_order() {
    let (client, server) = open("sda", &["qemu:dirty-bitmap:b0", "base:allocation"]).unwrap();
    assert_eq!(client.size_bytes, u64::from(DISK_BYTES));
    assert!(client.structured);
    let expected = [(1, "qemu:dirty-bitmap:b0".to_owned()), (0, "base:allocation".to_owned())];
    assert_eq!(client.contexts, expected);
    let server = server.unwrap();
    assert_eq!((server.export, server.structured, server.contexts), (1, true, vec![0, 1]));
}

#[test]
fn an_unknown_export_is_named_in_the_error() {
    for contexts in [&["base:allocation"][..], &[]] {
        let error = open("sdb", contexts).unwrap_err();
        assert!(matches!(&error, HandshakeError::UnknownExport { name, .. } if name == "sdb"), "{error}");
    }
}

#[test]
fn a_missing_bitmap_is_an_error_and_not_a_smaller_session() {
    let error = open("sda", &["base:allocation", "qemu:dirty-bitmap:gone"]).unwrap_err();
    let HandshakeError::UnknownContext { export, context } = error else { panic!("{error}") };
    assert_eq!((export.as_str(), context.as_str()), ("sda", "qemu:dirty-bitmap:gone"));
}

#[test]
fn all_contexts_of_an_export_can_be_listed() {
    let client = ClientHandshake::list_contexts("sda").unwrap();
    let (session, server) = shake_hands(client, &exports(), &[]).unwrap();
    let names: Vec<&str> = session.contexts.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:other:x"]);
    assert_eq!(server, None);
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

/// Sends options to a server; returns (kind, data) of all its replies.
fn ask(options: &[Vec<u8>]) -> Vec<(u32, Vec<u8>)> {
    let mut out = Vec::new();
    let mut server = ServerHandshake::new(&mut out);
    out.clear();
    let stream = [vec![0, 0, 0, 3], options.concat()].concat();
    feed(&stream, &[], |bytes| Some(server.decode(bytes, &exports(), &mut out).unwrap()));
    let mut replies = Vec::new();
    let mut rest = &out[..];
    while !rest.is_empty() {
        let length = u32::from_be_bytes(rest[16..20].try_into().unwrap()) as usize;
        let kind = u32::from_be_bytes(rest[12..16].try_into().unwrap());
        replies.push((kind, rest[20..20 + length].to_vec()));
        rest = &rest[20 + length..];
    }
    replies
}

fn kinds(options: &[Vec<u8>]) -> Vec<u32> {
    ask(options).into_iter().map(|(kind, _)| kind).collect()
}

const UNSUPPORTED: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;
const TOO_BIG: u32 = 0x8000_0009;

#[test]
fn unknown_options_are_refused_and_the_handshake_goes_on() {
    // STARTTLS, extended headers and one that nobody has heard of; then ABORT.
    let options = [option(5, &[]), option(11, &[]), option(4711, b"data"), option(2, &[])];
    assert_eq!(kinds(&options), [UNSUPPORTED, UNSUPPORTED, UNSUPPORTED, 1]);
}

#[test]
fn an_option_too_long_is_passed_over() {
    assert_eq!(kinds(&[option(99, &vec![7; 100_000]), option(2, &[])]), [TOO_BIG, 1]);
}

#[test]
fn contexts_before_structured_replies_are_refused() {
    let data = [&[0, 0, 0, 3][..], b"sda", &[0, 0, 0, 0]].concat();
    assert_eq!(kinds(&[option(9, &data)]), [INVALID]);
    assert_eq!(kinds(&[option(8, &[]), option(9, &data)]), [1, 4, 4, 4, 1]);
}

#[test]
fn a_query_that_ends_in_a_colon_lists_what_lies_below_it() {
    let data = [&[0, 0, 0, 3][..], b"sda", &[0, 0, 0, 1, 0, 0, 0, 18], b"qemu:dirty-bitmap:"].concat();
    let replies = ask(&[option(8, &[]), option(9, &data)]);
    assert_eq!(replies[1], (4, [&[0; 4][..], b"qemu:dirty-bitmap:b0"].concat()));
    assert_eq!(replies.len(), 3);
}

#[test]
fn malformed_options_are_refused_and_not_read_beyond_their_end() {
    let too_long_a_name = [&[0, 0, 0, 200][..], b"sda", &[0, 0]].concat();
    assert_eq!(kinds(&[option(7, &too_long_a_name), option(6, &[])]), [INVALID, INVALID]);
    assert_eq!(kinds(&[option(3, b"x")]), [INVALID]);
}

#[test]
fn the_oldest_option_opens_an_export_too() {
    let mut out = Vec::new();
    let mut server = ServerHandshake::new(&mut out);
    out.clear();
    let stream = [&[0, 0, 0, 1][..], &option(1, b"sda")].concat();
    let (steps, _) = feed(&stream, &[], |bytes| Some(server.decode(bytes, &exports(), &mut out).unwrap()));
    assert!(matches!(&steps[1], ServerStep::Done(session) if session.export == 1 && !session.structured));
    assert_eq!(out.len(), 8 + 2 + 124);
}

fn hole(at: u64) -> bool {
    (at / 1000) % 3 == 1
}

/// The disk of the transmission tests: holes and data, each byte of data telling its place.
fn disk_bytes(offset: u64, length: u32) -> Vec<u8> {
    let byte = |at: u64| if hole(at) { 0 } else { u8::try_from(at % 251).unwrap() | 1 };
    (offset..offset + u64::from(length)).map(byte).collect()
}

fn disk_extents(offset: u64, length: u32) -> Vec<(u64, bool)> {
    let mut extents: Vec<(u64, bool)> = Vec::new();
    for at in offset..offset + u64::from(length) {
        match extents.last_mut() {
            Some((length, last)) if *last == hole(at) => *length += 1,
            _ => extents.push((1, hole(at))),
        }
    }
    extents
}

fn made(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

/// A small server: answers one request with a list of chunks. Every other one ends in a chunk of its own.
fn answer(session: &ServerSession, request: nbd::Request) -> Vec<Vec<u8>> {
    let cookie = request.cookie;
    let mut chunks = Vec::new();
    match session.judge(&request) {
        Err(code) if session.structured => {
            chunks.push(made(|out| encode_error(out, cookie, code, "no", Some(request.offset))));
        }
        Err(code) => chunks.push(encode_simple(cookie, Some(code)).to_vec()),
        Ok(Command::Read { offset, length, .. }) if !session.structured => {
            chunks.push([&encode_simple(cookie, None)[..], &disk_bytes(offset, length)].concat());
        }
        Ok(Command::Read { offset, length, .. }) => {
            let pieces = split_at_holes(offset, length, &disk_extents(offset, length), 700);
            for (place, piece) in pieces.iter().enumerate() {
                let last = place + 1 == pieces.len() && cookie.is_multiple_of(2);
                chunks.push(made(|out| {
                    if piece.hole {
                        return encode_hole(out, cookie, piece.offset, piece.length, last);
                    }
                    out.extend(encode_data_header(cookie, piece.offset, piece.length, last).unwrap());
                    out.extend(disk_bytes(piece.offset, piece.length));
                }));
            }
            if !cookie.is_multiple_of(2) {
                chunks.push(made(|out| encode_done(out, cookie)));
            }
        }
        Ok(Command::BlockStatus { offset, length, .. }) => {
            for (place, &context) in session.contexts.iter().enumerate() {
                let mut extents: Vec<(u32, u32)> = disk_extents(offset, length)
                    .iter()
                    .map(|&(length, hole)| (u32::try_from(length).unwrap(), u32::from(hole)))
                    .collect();
                // Longer than was asked for: servers may do that.
                extents.last_mut().unwrap().0 += 12_345;
                let (context, last) = (u32::try_from(context).unwrap(), place + 1 == session.contexts.len());
                chunks.push(made(|out| encode_status(out, cookie, context, &extents, last)));
            }
        }
        Ok(Command::Flush | Command::Disconnect) => chunks.push(encode_simple(cookie, None).to_vec()),
    }
    chunks
}

/// What a client learned, in a form that does not depend on how the replies were cut.
#[derive(Debug, Default, PartialEq)]
struct Learned {
    bytes: Vec<(u64, u8)>,
    extents: Vec<(u32, u64, u64, u32)>,
    finished: Vec<u64>,
    failed: Vec<(u64, ErrorCode)>,
}

impl Learned {
    fn note(&mut self, reply: nbd::Reply<'_>) {
        match reply.body {
            Body::Data { offset, bytes } => self.bytes.extend((offset..).zip(bytes.iter().copied())),
            Body::Hole { offset, length } => {
                self.bytes.extend((offset..offset + u64::from(length)).map(|at| (at, 0)));
            }
            Body::Status { context, extents } => {
                self.extents
                    .extend(extents.map(|extent| (context, extent.offset, extent.length, extent.flags)));
            }
            Body::Failed { code, .. } => self.failed.push((reply.cookie, code)),
            Body::Nothing => {}
        }
        if reply.finished {
            self.finished.push(reply.cookie);
        }
    }

    fn sorted(mut self) -> Self {
        self.bytes.sort_unstable();
        self.extents.sort_unstable();
        self.finished.sort_unstable();
        self
    }
}

/// (READ or else BLOCK_STATUS, offset, length)
fn requests() -> impl Strategy<Value = Vec<(bool, u64, u32)>> {
    let request = (any::<bool>(), 0..DISK_BYTES, 1u32..5000);
    let inside =
        |(read, offset, length): (bool, u32, u32)| (read, u64::from(offset), length.min(DISK_BYTES - offset));
    prop::collection::vec(request.prop_map(inside), 1..8)
}

#[test]
fn a_trim_is_answered_without_data_by_success_or_refusal() {
    let (session, server) = open("sda", &["base:allocation"]).unwrap();
    assert!(session.structured, "which makes no difference to it");
    let mut client = ClientTransmission::new(session);
    let mut stream = Vec::new();
    let done = client.trim(0, 4096, &mut stream).unwrap();
    client.trim(4096, u32::MAX, &mut stream).unwrap_err();
    let reply = encode_simple(done, None);
    let decoded = client.decode(&reply).unwrap();
    let body = Body::Nothing;
    assert_eq!(decoded, Decoded::Ready(reply.len(), Reply { cookie: done, body, finished: true }));

    let refused = client.trim(0, 4096, &mut stream).unwrap();
    let (requests, _) = feed(&stream, &[], {
        let mut decoder = RequestDecoder::new();
        move |bytes| Some(decoder.decode(bytes).unwrap())
    });
    let last = requests.into_iter().flatten().last().unwrap();
    let code = server.unwrap().judge(&last).unwrap_err();
    let reply = encode_simple(refused, Some(code));
    let Decoded::Ready(_, Reply { body: Body::Failed { code, .. }, finished: true, .. }) =
        client.decode(&reply).unwrap()
    else {
        panic!("a read-only export refuses it")
    };
    assert_eq!((code, client.in_flight()), (ErrorCode::NOT_PERMITTED, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_handshake_does_not_depend_on_how_its_bytes_arrive(cuts in prop::collection::vec(1usize..40, 0..60)) {
        let client = ClientHandshake::open("sda", &["qemu:dirty-bitmap:b0"]).unwrap();
        prop_assert_eq!(
            shake_hands(client, &exports(), &cuts).unwrap(),
            open("sda", &["qemu:dirty-bitmap:b0"]).unwrap()
        );
    }

    #[test]
    fn what_a_client_learns_is_what_the_server_has_in_any_order_and_any_cut(
        asked in requests(),
        structured in any::<bool>(),
        order in any::<u64>(),
        cuts in prop::collection::vec(1usize..900, 0..60),
    ) {
        let contexts: &[&str] = if structured { &["base:allocation", "qemu:other:x"] } else { &[] };
        let (mut session, server) = open("sda", contexts).unwrap();
        let mut server = server.unwrap();
        (session.structured, server.structured) = (structured, structured);
        let mut client = ClientTransmission::new(session);
        let (mut stream, mut expected) = (Vec::new(), Learned::default());
        for &(read, offset, length) in &asked {
            let cookie = if read || !structured {
                expected.bytes.extend((offset..).zip(disk_bytes(offset, length)));
                client.read(offset, length, &mut stream).unwrap()
            } else {
                let mut at = offset;
                for (length, hole) in disk_extents(offset, length) {
                    expected.extents.extend([0, 2].map(|context| (context, at, length, u32::from(hole))));
                    at += length;
                }
                client.block_status(offset, length, &mut stream).unwrap()
            };
            expected.finished.push(cookie);
        }

        let mut decoder = RequestDecoder::new();
        let (seen, consumed) = feed(&stream, &cuts, |bytes| Some(decoder.decode(bytes).unwrap()));
        prop_assert_eq!(consumed, stream.len());
        // Replies come in any order, and the chunks of several are mixed.
        let mut queues: Vec<Vec<Vec<u8>>> =
            seen.into_iter().flatten().map(|request| answer(&server, request)).collect();
        let (mut replies, mut order) = (Vec::new(), order);
        while !queues.is_empty() {
            let place = usize::try_from(order % queues.len() as u64).unwrap();
            order = order.rotate_left(7) ^ 0x9e37;
            replies.extend(queues[place].remove(0));
            if queues[place].is_empty() {
                queues.remove(place);
            }
        }

        let mut learned = Learned::default();
        let (_, consumed) = feed(&replies, &cuts, |bytes| {
            Some(match client.decode(bytes).unwrap() {
                Decoded::More(more) => Decoded::More(more),
                Decoded::Ready(consumed, reply) => {
                    learned.note(reply);
                    Decoded::Ready(consumed, ())
                }
            })
        });
        prop_assert_eq!(consumed, replies.len());
        prop_assert_eq!(client.in_flight(), 0);
        prop_assert_eq!(learned.sorted(), expected.sorted());
    }
}
