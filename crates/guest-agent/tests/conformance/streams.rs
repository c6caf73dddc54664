//! The byte streams: valid, wrong, split at every byte, made up. The same ones in every run.

use super::forms;

/// Ends whatever a stream left unfinished.
const END: &[u8] = b"\n\xFF";

/// How much alike the answers must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Like {
    /// Byte for byte, but for the order of members.
    Exactly,
    /// Numbers are of the moment; everything else is the same.
    ButNumbers,
}

/// Bytes for both agents.
pub(crate) struct Stream {
    /// The kind of stream, for the reader of a failure.
    pub(crate) name: &'static str,
    /// The command that it is about: it is passed over where an agent does not have it.
    pub(crate) command: Option<&'static str>,
    pub(crate) pieces: Vec<Vec<u8>>,
    pub(crate) like: Like,
}

fn stream(name: &'static str, bytes: impl Into<Vec<u8>>) -> Stream {
    Stream { name, command: None, pieces: vec![[bytes.into(), END.to_vec()].concat()], like: Like::Exactly }
}

/// All of them.
pub(crate) fn all() -> Vec<Stream> {
    let mut all = Vec::new();
    all.extend(questions());
    all.extend(
        forms::wrong().into_iter().map(|(command, request)| Stream {
            command: Some(command),
            ..stream("wrong arguments", request)
        }),
    );
    all.extend(envelopes());
    all.extend(grammar());
    all.extend(strings());
    all.extend(numbers());
    all.extend(splits());
    all.extend(hostile());
    all.extend(made_up());
    all
}

/// Right requests that change nothing.
fn questions() -> Vec<Stream> {
    let exactly = [
        "guest-ping",
        "guest-fsfreeze-status",
        "guest-get-osinfo",
        "guest-get-host-name",
        "guest-get-timezone",
        "guest-get-users",
        "guest-get-vcpus",
        "guest-get-memory-blocks",
        "guest-get-memory-block-info",
        "guest-get-fsinfo",
        "guest-get-disks",
        "guest-network-get-route",
        "guest-fsfreeze-thaw",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-freeze-list",
        "guest-fstrim",
    ];
    let numbers = [
        "guest-get-time",
        "guest-get-load",
        "guest-get-cpustats",
        "guest-get-diskstats",
        "guest-network-get-interfaces",
    ];
    let asked = |name: &'static str, like| {
        let request = format!(r#"{{"execute": "{name}"}}"#);
        Stream { command: Some(name), like, ..stream("question", request) }
    };
    exactly
        .iter()
        .map(|name| asked(name, Like::Exactly))
        .chain(numbers.iter().map(|name| asked(name, Like::ButNumbers)))
        .collect()
}

/// Everything around the arguments.
fn envelopes() -> Vec<Stream> {
    let mut all = Vec::new();
    for request in [
        r#"{}"#,
        r#"[]"#,
        r#""guest-ping""#,
        "17",
        "-1.5",
        "true",
        "null",
        r#"{"execute": null}"#,
        r#"{"execute": 1}"#,
        r#"{"execute": ["guest-ping"]}"#,
        r#"{"execute": ""}"#,
        r#"{"execute": "guest-ping "}"#,
        r#"{"execute": "GUEST-PING"}"#,
        r#"{"execute": "guest_ping"}"#,
        r#"{"execute": "nope\u0000"}"#,
        r#"{"execute": "n\u00e9\ud83d\ude00"}"#,
        r#"{"execute": "qmp_capabilities"}"#,
        r#"{"exec-oob": "guest-ping"}"#,
        r#"{"exec-oob": "guest-ping", "execute": "guest-ping"}"#,
        r#"{"execute": "guest-ping", "control": {}}"#,
        r#"{"execute": "guest-ping", "execute": "guest-ping"}"#,
        r#"{"arguments": {}}"#,
        r#"{"arguments": 1}"#,
        r#"{"execute": 1, "arguments": 1}"#,
        r#"{"execute": "guest-ping", "arguments": {}}"#,
        r#"{"execute": "guest-ping", "arguments": {"a": {"b": {"c": []}}}}"#,
        r#"{"execute": "nope", "arguments": {"x": 1}}"#,
        r#"{"execute": "nope", "arguments": 1}"#,
        r#"{"execute": "nope", "x": 1}"#,
        r#"{"id": 1}"#,
        r#"{'execute': 'guest-ping'}"#,
        r#"{'execute': 'it\'s'}"#,
        r#"{"execute": 'guest-ping'}"#,
        "{\"execute\"\n:\n\"guest-ping\"\n}\n",
        "\t{ \"execute\" \r\n: \"guest-ping\" }",
        r#"{"execute":"guest-ping"}{"execute":"guest-ping"}"#,
        r#"{"execute":"guest-ping"},{"execute":"guest-ping"}"#,
        r#"[{"execute":"guest-ping"}]"#,
        "# a comment\n{\"execute\":\"guest-ping\"}",
        "// a comment\n{\"execute\":\"guest-ping\"}",
        "/* a comment */{\"execute\":\"guest-ping\"}",
    ] {
        all.push(stream("envelope", request));
    }
    for id in [
        "null",
        "0",
        "-7",
        "1.5",
        r#""x""#,
        "true",
        "[]",
        "{}",
        r#"[1, [2, {"a": null}]]"#,
        r#"{"b": 1, "a": [true, false, null, "x"]}"#,
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        "1e3",
        r#""\ud83d\ude00\u0001""#,
    ] {
        for request in [
            format!(r#"{{"execute": "guest-ping", "id": {id}}}"#),
            format!(r#"{{"id": {id}, "execute": "nope"}}"#),
            format!(r#"{{"id": {id}}}"#),
            format!(r#"{{"id": {id}, "execute": "guest-ping", "arguments": {{"x": 1}}}}"#),
            format!(r#"{{"id": {id}, "execute": "guest-sync", "arguments": {{"id": 8}}}}"#),
            format!(r#"{{"id": {id}, "execute": "guest-sync-delimited", "arguments": {{"id": 8}}}}"#),
        ] {
            all.push(stream("id", request));
        }
    }
    all
}

/// Every sequence of up to three tokens, and some of four and five.
fn grammar() -> Vec<Stream> {
    const TOKENS: [&str; 10] = ["{", "}", "[", "]", ":", ",", "\"a\"", "1", "true", "nope"];
    let mut all = Vec::new();
    let mut sequences: Vec<String> = vec![String::new()];
    for length in 1..=3 {
        sequences = sequences
            .iter()
            .flat_map(|before| TOKENS.iter().map(move |token| format!("{before}{token} ")))
            .collect();
        let every = if length == 3 { 2 } else { 1 };
        all.extend(sequences.iter().step_by(every).map(|text| stream("grammar", text.as_bytes())));
    }
    let mut dice = Dice(17);
    for _ in 0..400 {
        let tokens: Vec<&str> = (0..4 + dice.below(5)).map(|_| TOKENS[dice.below(TOKENS.len())]).collect();
        all.push(stream("grammar", tokens.join("")));
    }
    for text in [
        "01",
        "-",
        "-a",
        "1.",
        "1.e1",
        "1e",
        "1e+",
        ".5",
        "+1",
        "0x10",
        "1a",
        "--1",
        "tru",
        "True",
        "NaN",
        "Infinity",
        "nul\u{e9}",
        "\"",
        "\"abc",
        "'abc",
        "\"abc'",
        "&",
        "\\",
        "`",
        "~",
        "@",
        "\u{7f}",
        "\u{feff}{}",
        "{\"a\": &}",
        "{\"a\": \\ junk 1 x",
        "[1,2,&,{}]",
        "&abc{}",
        "&\tabc\n5\n",
        "&[",
        "& ]",
        "&:",
        "&,",
        "{\"a\": 1,}",
        "[1,]",
        "{,}",
        "[,]",
        "{\"a\"}",
        "{\"a\":}",
        "{1:2}",
        "{\"a\" 2}",
        "{\"a\":1 2}",
        "[1 2]",
        "{\"a\":1,\"a\":2}",
        "{\"a\" 2, [{}]} {\"b\":1}",
        "{]{}",
        "[}{}",
        "}}}}",
        "]]]]",
        "{\"a\n{}",
        "{\"execute\": \"guest-ping\"",
        "{\"execute\": \"guest-ping\"]",
        "[[[[[[",
        "{{{{{{",
    ] {
        all.push(stream("grammar", text));
    }
    all
}

/// What strings may hold: they come back as `id`.
fn strings() -> Vec<Stream> {
    let ask =
        |text: &[u8]| stream("string", [b"{\"execute\": \"guest-ping\", \"id\": \"", text, b"\"}"].concat());
    let mut all: Vec<Stream> = (0..=255u8).map(|byte| ask(&[b'a', byte, b'z'])).collect();
    all.extend((0..=255u8).map(|byte| ask(&[b'\\', byte])));
    for code in [
        "\\u0000",
        "\\u0041",
        "\\u007f",
        "\\u0080",
        "\\u00e9",
        "\\uD83D\\uDE00",
        "\\ud83d",
        "\\uDE00",
        "\\uDE00\\uD83D",
        "\\ud83d\\u0041",
        "\\ud83dx",
        "\\ud83d\\n",
        "\\uFFFD",
        "\\uFFFE",
        "\\uFFFF",
        "\\uFDD0",
        "\\uFDEF",
        "\\uD83F\\uDFFE",
        "\\uDBFF\\uDFFF",
        "\\u12",
        "\\u",
        "\\u12G4",
        "\\uZZZZ",
        "\\U0041",
        "\\x41",
    ] {
        all.push(ask(code.as_bytes()));
    }
    for bytes in [
        &b"\xC2\x80"[..],
        b"\xDF\xBF",
        b"\xC0\x80",
        b"\xC0\xAF",
        b"\xC1\xBF",
        b"\xE0\x80\x80",
        b"\xE0\xA0\x80",
        b"\xED\x9F\xBF",
        b"\xED\xA0\x80",
        b"\xED\xBF\xBF",
        b"\xEE\x80\x80",
        b"\xEF\xBF\xBD",
        b"\xEF\xBF\xBE",
        b"\xEF\xBF\xBF",
        b"\xEF\xB7\x90",
        b"\xF0\x80\x80\x80",
        b"\xF0\x90\x80\x80",
        b"\xF0\x9F\x98\x80",
        b"\xF4\x8F\xBF\xBD",
        b"\xF4\x8F\xBF\xBF",
        b"\xF4\x90\x80\x80",
        b"\xF7\xBF\xBF\xBF",
        b"\xF8\x88\x80\x80\x80",
        b"\xFC\x84\x80\x80\x80\x80",
        b"\xC3",
        b"\xC3\xC3\xA9",
        b"\xE2\x82",
        b"\xE2\x82\xAC\xAC",
        b"\x80",
        b"\xBF",
        b"\xC3(",
        b"\xE2(\xA1",
        b"\xF0(\x8C\xBC",
        b"\xF0\x9F\x98",
    ] {
        all.push(ask(bytes));
        all.push(stream("string", [b"{\"execute\": \"", bytes, b"\"}"].concat()));
        all.push(stream("string", [b"{\"", bytes, b"\": 1}"].concat()));
    }
    let mut dice = Dice(23);
    for _ in 0..150 {
        let text: Vec<u8> = (0..1 + dice.below(12)).map(|_| dice.byte()).collect();
        all.push(ask(&text));
    }
    all
}

/// What numbers become: they come back as `id`.
fn numbers() -> Vec<Stream> {
    let mut all = Vec::new();
    let mut literals: Vec<String> = [
        "0",
        "-0",
        "-0.0",
        "0.0",
        "1.0",
        "0.1",
        "0.06",
        "0.5",
        "100.0",
        "1e2",
        "1E2",
        "1e+2",
        "1e-2",
        "1e0",
        "1e15",
        "1e16",
        "1e17",
        "1e18",
        "1e22",
        "1e23",
        "123456789.125",
        "0.0001",
        "0.00001",
        "0.000123",
        "1e-5",
        "5e-324",
        "1e-400",
        "1e308",
        "1.7976931348623157e308",
        "0.30000000000000004",
        "9007199254740993",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        "123456789012345678901234567890",
        "-123456789012345678901234567890",
        "3.14159265358979323846",
        "2.2250738585072014e-308",
        "4.9406564584124654e-324",
        "0.1e1",
        "12345678901234567.0",
        "1234567890123456.0",
        "99999999999999999999.5",
        "1e999",
        "-1e999",
    ]
    .map(str::to_owned)
    .to_vec();
    let mut dice = Dice(5);
    for _ in 0..150 {
        let exponent = dice.below(60) as i64 - 30;
        literals.push(format!("{}.{}e{exponent}", dice.below(100_000), dice.below(1_000_000_000)));
    }
    for literal in literals {
        all.push(stream("number", format!(r#"{{"execute": "guest-ping", "id": {literal}}}"#)));
    }
    all
}

/// Requests cut in two at every byte, and sent byte by byte.
fn splits() -> Vec<Stream> {
    let requests: [&[u8]; 4] = [
        "{\"execute\": \"guest-sync\", \"arguments\": {\"id\": -12}, \"id\": \"\u{e9}\\ud83d\\ude00\"}".as_bytes(),
        b"{\"execute\": \"guest-sync\", \"arguments\": {\"id\": 1.5e3, 'x': [tr&e]}} {\"execute\": \"guest-ping\"}",
        b"{\"execute\": \"guest-fi\xFF{\"execute\": \"guest-sync-delimited\", \"arguments\": {\"id\": 9}}\n",
        b"{\"execute\": \"nope\"}\n17 null {\"execute\": \"guest-ping\", \"arguments\": {\"x\": 12}}",
    ];
    let mut all = Vec::new();
    for request in requests {
        let whole = [request, END].concat();
        for cut in 1..request.len() {
            let pieces = vec![whole[..cut].to_vec(), whole[cut..].to_vec()];
            all.push(Stream { pieces, ..stream("split", "") });
        }
        let pieces = whole.iter().map(|byte| vec![*byte]).collect();
        all.push(Stream { pieces, ..stream("byte by byte", "") });
    }
    all
}

/// What only someone who means harm would send.
fn hostile() -> Vec<Stream> {
    let deep = |open: &str, count: usize| open.repeat(count);
    let nested = |count: usize| format!("{}{}", "[".repeat(count), "]".repeat(count));
    let ping = r#"{"execute":"guest-ping"}"#;
    let mut all = vec![
        stream("deep", deep("[", 1023)),
        stream("deep", deep("[", 1024)),
        stream("deep", deep("[", 1025)),
        stream("deep", deep("{\"a\":", 1100)),
        stream("deep", deep("[", 100_000)),
        stream("deep", nested(1024)),
        stream("deep", nested(1025)),
        stream("deep", nested(5000)),
        stream("deep", format!(r#"{{"execute": "guest-ping", "id": {}}}"#, nested(1000))),
        stream("closed too often", "]".repeat(3000)),
        stream("many", ping.repeat(1000)),
        stream("many", "{}".repeat(1000)),
        stream("many", "\u{0}".repeat(300)),
        stream("many", vec![0xFF; 300]),
        stream("long", format!(r#"{{"execute": "{}"}}"#, "x".repeat(1000))),
        stream("long", format!(r#"{{"execute": "guest-ping", "id": "{}"}}"#, "\u{e9}".repeat(100_000))),
        stream("long", format!(r#"{{"execute": "guest-ping", "id": [{}1]}}"#, "1, ".repeat(50_000))),
        stream("long", format!("\"{}", "x".repeat(3_000_000))),
        stream("long", "1".repeat(200)),
        stream("long", format!("[{}]", "a".repeat(200))),
    ];
    // Beyond a limit what is left is read as fresh input, so that what comes must match too.
    all.push(stream("too many tokens", format!("[{}1]", "1,".repeat(1 << 20))));
    all
}

/// Random bytes, and right requests with something wrong in them.
fn made_up() -> Vec<Stream> {
    const BASES: [&[u8]; 6] = [
        br#"{"execute": "guest-sync", "arguments": {"id": 1234}, "id": "x"}"#,
        br#"{"execute": "guest-ping", "id": {"a": [1, 2.5, true, null, "\u00e9\n"]}}"#,
        br#"{"execute": "guest-exec-status", "arguments": {"pid": 99999999}}"#,
        br#"{"execute": "guest-sync-delimited", "arguments": {"id": -1}}"#,
        br#"{'execute': 'guest-fsfreeze-status'}"#,
        br#"[{"a": "b"}, {"c": {}}] {"execute": "guest-ping"}"#,
    ];
    const SPICE: &[u8] = b"{}[]:,\"'\\\n\t 0-1.eEtfnu\x00\x80\xC0\xED\xFE\xFF";
    let mut dice = Dice(99);
    let mut all = Vec::new();
    for round in 0..1500 {
        let mut bytes = BASES[round % BASES.len()].to_vec();
        for _ in 0..1 + dice.below(4) {
            let at = dice.below(bytes.len());
            let spice = SPICE[dice.below(SPICE.len())];
            match dice.below(6) {
                0 => bytes[at] = spice,
                1 => bytes.insert(at, spice),
                2 => drop(bytes.remove(at)),
                3 => bytes.truncate(at.max(1)),
                4 => bytes[at] ^= 1 << dice.below(8),
                _ => {
                    let piece = bytes[at..(at + 8).min(bytes.len())].to_vec();
                    let to = dice.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        all.push(stream("spoilt", bytes));
    }
    for _ in 0..300 {
        let bytes: Vec<u8> = (0..1 + dice.below(60)).map(|_| dice.byte()).collect();
        all.push(stream("noise", bytes));
    }
    for _ in 0..300 {
        let bytes: Vec<u8> = (0..1 + dice.below(40)).map(|_| SPICE[dice.below(SPICE.len())]).collect();
        all.push(stream("spicy noise", bytes));
    }
    all
}

/// Numbers that look random and are the same in every run. Source: xorshift64, G. Marsaglia, "Xorshift RNGs", 2003.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from((self.next() >> 16) % limit as u64).unwrap()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }
}
