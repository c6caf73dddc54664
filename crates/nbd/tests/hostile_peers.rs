//! Peers that lie: no panic, no buffer that grows, no answer that was not asked for.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use nbd::{
    Body, ClientHandshake, ClientTransmission, Decoded, ErrorCode, Export, ProtocolError, Request,
    RequestDecoder, RequestError, ServerHandshake, ServerSession, Session, encode_data_header, encode_done,
    encode_error, encode_hole, encode_simple, encode_status,
};
use proptest::prelude::*;

fn session(structured: bool) -> Session {
    let contexts = vec![(5, "base:allocation".to_owned())];
    Session { size_bytes: 1 << 30, flags: 1, structured, read_bytes_max: 32 << 20, contexts }
}

/// A client with a READ of 8192+4096 (cookie 1) and a BLOCK_STATUS of the same stretch (cookie 2) under way.
fn client(structured: bool) -> ClientTransmission {
    let mut client = ClientTransmission::new(session(structured));
    let mut out = Vec::new();
    assert_eq!(client.read(8192, 4096, &mut out), Ok(1));
    assert_eq!(client.block_status(8192, 4096, &mut out), Ok(2));
    client
}

/// The first error that these replies lead to.
fn refused(replies: &[Vec<u8>]) -> Option<ProtocolError> {
    let (mut client, stream) = (client(true), replies.concat());
    let mut rest = &stream[..];
    while !rest.is_empty() {
        match client.decode(rest) {
            Ok(Decoded::More(_)) => return None,
            Ok(Decoded::Ready(consumed, _)) => rest = &rest[consumed..],
            Err(error) => return Some(error),
        }
    }
    None
}

fn made(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    encode(&mut out);
    out
}

fn data(offset: u64, length: u32, last: bool) -> Vec<u8> {
    let mut out = encode_data_header(1, offset, length, last).unwrap().to_vec();
    out.resize(out.len() + length as usize, 0xaa);
    out
}

#[test]
fn data_that_was_not_asked_for_is_refused() {
    let stray = |offset, length| Some(ProtocolError::Stray { offset, length });
    assert_eq!(refused(&[data(8191, 10, false)]), stray(8191, 10));
    assert_eq!(refused(&[data(12_280, 10, false)]), stray(12_280, 10));
    assert_eq!(refused(&[data(u64::MAX, 10, false)]), stray(u64::MAX, 10));
    assert_eq!(refused(&[data(8192, 0, false)]), stray(8192, 0));
    assert_eq!(refused(&[made(|out| encode_hole(out, 1, 8192, 5000, true))]), stray(8192, 5000));
}

#[test]
fn data_that_comes_twice_is_refused() {
    let replies = [data(9000, 100, false), data(9099, 10, false)];
    assert_eq!(refused(&replies), Some(ProtocolError::Stray { offset: 9099, length: 10 }));
}

#[test]
fn a_read_that_ends_with_bytes_missing_is_refused() {
    let incomplete = |answered| Some(ProtocolError::Incomplete { answered, asked: 4096 });
    assert_eq!(refused(&[data(8192, 4095, true)]), incomplete(4095));
    assert_eq!(refused(&[made(|out| encode_done(out, 1))]), incomplete(0));
}

#[test]
fn a_chunk_longer_than_its_request_is_refused_before_it_is_waited_for() {
    let header = &encode_data_header(1, 8192, 4097, true).unwrap()[..20];
    let refusal = client(true).decode(header).unwrap_err();
    assert!(matches!(refusal, ProtocolError::TooLong { length: 4105, limit: 4104, .. }), "{refusal}");
}

#[test]
fn an_extent_of_no_length_is_refused() {
    let status = made(|out| encode_status(out, 2, 5, &[(512, 0), (0, 1)], true));
    assert_eq!(refused(&[status]), Some(ProtocolError::EmptyExtent));
}

#[test]
fn an_unknown_or_repeated_context_is_refused() {
    let status = |context, last| made(|out| encode_status(out, 2, context, &[(512, 0)], last));
    assert!(matches!(refused(&[status(6, true)]), Some(ProtocolError::Unexpected { number: 6, .. })));
    let twice = [status(5, false), status(5, true)];
    assert!(matches!(refused(&twice), Some(ProtocolError::Unexpected { number: 5, .. })));
}

#[test]
fn a_status_that_ends_without_an_answer_is_refused() {
    let replies = [made(|out| encode_done(out, 2))];
    assert_eq!(refused(&replies), Some(ProtocolError::Incomplete { answered: 0, asked: 1 }));
}

#[test]
fn a_reply_to_no_request_is_refused() {
    assert_eq!(refused(&[made(|out| encode_done(out, 77))]), Some(ProtocolError::UnknownCookie(77)));
    let late = [made(|out| encode_hole(out, 1, 8192, 4096, true)), made(|out| encode_done(out, 1))];
    assert_eq!(refused(&late), Some(ProtocolError::UnknownCookie(1)));
}

#[test]
fn a_simple_success_where_structured_replies_were_agreed_is_refused() {
    let reply = encode_simple(1, None).to_vec();
    assert!(matches!(refused(&[reply]), Some(ProtocolError::Unexpected { .. })));
}

#[test]
fn a_failure_carries_the_servers_words_escaped() {
    let error = made(|out| encode_error(out, 1, ErrorCode::IO, "disk\n\u{1b}[31mgone", Some(9000)));
    let mut client = client(true);
    let Ok(Decoded::Ready(_, reply)) = client.decode(&error) else { panic!("no reply") };
    assert!(reply.finished);
    let message = r"disk\n\u{1b}[31mgone".to_owned();
    assert_eq!(reply.body, Body::Failed { code: ErrorCode::IO, message, offset: Some(9000) });
}

#[test]
fn extents_are_clipped_to_what_was_asked() {
    let status = made(|out| encode_status(out, 2, 5, &[(1000, 1), (u32::MAX, 0), (9, 3)], true));
    let mut client = client(true);
    let Ok(Decoded::Ready(_, reply)) = client.decode(&status) else { panic!("no reply") };
    let Body::Status { context: 5, extents } = reply.body else { panic!("no status") };
    let extents: Vec<_> = extents.map(|extent| (extent.offset, extent.length, extent.flags)).collect();
    assert_eq!(extents, [(8192, 1000, 1), (9192, 3096, 0)]);
}

#[test]
fn requests_outside_the_disk_or_above_the_limits_are_never_sent() {
    let mut client = ClientTransmission::new(session(true));
    let mut out = Vec::new();
    for (offset, length) in [(1 << 30, 1), ((1 << 30) - 5, 6), (u64::MAX, 2), (0, 0)] {
        assert!(matches!(client.read(offset, length, &mut out), Err(RequestError::OutsideDisk { .. })));
    }
    assert!(matches!(client.read(0, (32 << 20) + 1, &mut out), Err(RequestError::TooLong { .. })));
    assert!(out.is_empty());
    for _ in 0..nbd::limits::REQUESTS_IN_FLIGHT_MAX {
        client.read(0, 512, &mut out).unwrap();
    }
    assert_eq!(client.read(0, 512, &mut out), Err(RequestError::TooMany));
}

/// A server's view of one request.
fn judged(command: u16, flags: u16, offset: u64, length: u32) -> Option<ErrorCode> {
    let server = ServerSession { export: 0, size_bytes: 4096, structured: true, contexts: vec![] };
    server.judge(&Request { flags, command, cookie: 1, offset, length }).err()
}

#[test]
fn everything_that_writes_is_refused() {
    for write in [1, 4, 6, 8] {
        assert_eq!(judged(write, 0, 0, 512), Some(ErrorCode::NOT_PERMITTED), "{write}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let invalid = Some(ErrorCode::INVALID);
    assert_eq!(judged(0, 0, 0, 4096), None);
    assert_eq!(judged(0, 0, 4000, 97), invalid, "beyond the end");
    assert_eq!(judged(0, 0, u64::MAX, 2), invalid, "overflow");
    assert_eq!(judged(0, 0, 0, 0), invalid, "empty");
    assert_eq!(judged(0, 1 << 5, 0, 512), invalid, "unknown flag");
    assert_eq!(judged(7, 0, 0, 512), invalid, "no context agreed on");
    assert_eq!(judged(99, 0, 0, 512), invalid, "unknown command");
}

#[test]
fn the_payload_of_a_refused_write_is_passed_over() {
    let request = |command: u16, cookie: u64, length: u32| {
        let head = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0], &command.to_be_bytes()].concat();
        [&head[..], &cookie.to_be_bytes(), &0u64.to_be_bytes(), &length.to_be_bytes()].concat()
    };
    let stream = [request(1, 7, 1000), vec![0x25; 1000], request(0, 8, 512)].concat();
    let (mut decoder, mut rest, mut cookies) = (RequestDecoder::new(), &stream[..], Vec::new());
    while !rest.is_empty() {
        let Decoded::Ready(consumed, request) = decoder.decode(rest).unwrap() else { panic!("stands still") };
        rest = &rest[consumed..];
        cookies.extend(request.map(|request| request.cookie));
    }
    assert_eq!(cookies, [7, 8]);
    assert!(RequestDecoder::new().decode(&request(1, 7, u32::MAX)).is_err());
}

/// Real messages with some bytes changed, and a tail of anything.
fn garbage(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let parts = prop::collection::vec(prop::sample::select(seeds), 1..5);
    (parts, flips, prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(parts, flips, tail)| {
        let mut stream = [parts.concat(), tail].concat();
        let length = stream.len();
        for (place, value) in flips {
            stream[place.index(length)] = value;
        }
        stream
    })
}

/// Decodes until it fails or wants more; it must always get on, and never want more than `more_max`.
fn walk<T, E>(stream: &[u8], more_max: usize, mut decode: impl FnMut(&[u8]) -> Result<Decoded<T>, E>) {
    let mut rest = stream;
    loop {
        match decode(rest) {
            Err(_) => return,
            Ok(Decoded::More(more)) => {
                assert!(more > rest.len() && more <= more_max, "wants {more} bytes");
                return;
            }
            Ok(Decoded::Ready(consumed, _)) => {
                assert!(consumed > 0);
                rest = &rest[consumed..];
            }
        }
    }
}

fn replies() -> Vec<Vec<u8>> {
    vec![
        data(8192, 20, false),
        data(8192, 4096, true),
        made(|out| encode_hole(out, 1, 8192, 4096, true)),
        made(|out| encode_status(out, 2, 5, &[(512, 0), (u32::MAX, 1)], true)),
        made(|out| encode_error(out, 1, ErrorCode::IO, "gone", Some(9000))),
        made(|out| encode_done(out, 2)),
        encode_simple(1, None).to_vec(),
        encode_simple(2, Some(ErrorCode::IO)).to_vec(),
    ]
}

fn length32(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).unwrap().to_be_bytes()
}

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";

fn option_replies() -> Vec<Vec<u8>> {
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length32(data), data].concat()
    };
    vec![
        GREETING.to_vec(),
        reply(8, 1, &[]),
        reply(8, 0x8000_0001, &[]),
        reply(10, 4, b"\x00\x00\x00\x05base:allocation"),
        reply(10, 1, &[]),
        reply(7, 3, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]),
        reply(7, 3, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]),
        reply(7, 1, &[]),
    ]
}

fn options() -> Vec<Vec<u8>> {
    let option =
        |number: u32, data: &[u8]| [b"IHAVEOPT", &number.to_be_bytes()[..], &length32(data), data].concat();
    let contexts = b"\x00\x00\x00\x03sda\x00\x00\x00\x01\x00\x00\x00\x05base:";
    vec![
        vec![0, 0, 0, 3],
        option(1, b"sda"),
        option(3, &[]),
        option(6, b"\x00\x00\x00\x03sda\x00\x01\x00\x03"),
        option(8, &[]),
        option(9, contexts),
        option(10, contexts),
        option(77, &[0; 500]),
    ]
}

proptest! {
    #[test]
    fn a_hostile_server_cannot_upset_a_client(stream in garbage(replies()), structured in any::<bool>()) {
        let mut client = client(structured);
        let more_max = 20 + 4 + 8 * nbd::limits::STATUS_EXTENTS_MAX;
        walk(&stream, more_max, |bytes| {
            client.decode(bytes).map(|decoded| match decoded {
                Decoded::More(more) => Decoded::More(more),
                Decoded::Ready(consumed, _) => Decoded::Ready(consumed, ()),
            })
        });
    }

    #[test]
    fn a_hostile_server_cannot_upset_a_handshake(stream in garbage(option_replies()), greet in any::<bool>()) {
        let mut client = ClientHandshake::open("sda", &["base:allocation"]).unwrap();
        let stream = [if greet { GREETING } else { &[] }, &stream].concat();
        let mut out = Vec::new();
        walk(&stream, 20 + nbd::limits::OPTION_BYTES_MAX, |bytes| client.decode(bytes, &mut out));
        prop_assert!(out.len() < 1000);
    }

    #[test]
    fn a_hostile_client_cannot_upset_a_server(stream in garbage(options()), greet in any::<bool>()) {
        let exports = [Export {
            name: "sda".to_owned(),
            size_bytes: 512,
            flags: 3,
            contexts: vec!["base:allocation".to_owned()],
            preferred_bytes: 4096,
        }];
        let mut out = Vec::new();
        let mut server = ServerHandshake::new(&mut out);
        let stream = [if greet { &[0, 0, 0, 3][..] } else { &[] }, &stream].concat();
        walk(&stream, 16 + nbd::limits::OPTION_BYTES_MAX, |bytes| server.decode(bytes, &exports, &mut out));
    }

    #[test]
    fn hostile_requests_end_or_are_judged(stream in prop::collection::vec(any::<u8>(), 0..300), real in 0usize..6) {
        let mut stream = stream;
        for place in (0..real).map(|place| place * 28) {
            if let Some(magic) = stream.get_mut(place..place + 7) {
                magic.copy_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0]);
            }
        }
        let session = ServerSession { export: 0, size_bytes: 1 << 40, structured: true, contexts: vec![0] };
        let mut decoder = RequestDecoder::new();
        walk(&stream, 28, |bytes| {
            decoder.decode(bytes).inspect(|decoded| {
                if let Decoded::Ready(_, Some(request)) = decoded {
                    let _judged = session.judge(request);
                }
            })
        });
    }
}
