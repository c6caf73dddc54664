use super::{Item, Limits, Reader};
use proptest::prelude::*;
use serde_json::{Value, json};

fn limits() -> Limits {
    Limits { error_position: false, ..Limits::default() }
}

fn read(limits: Limits, pieces: &[&[u8]]) -> Vec<Item> {
    let mut reader = Reader::new(limits);
    let mut items = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while let Some(item) = reader.next(&mut rest) {
            items.push(item);
        }
        assert!(rest.is_empty(), "a reader takes all that it is given");
    }
    items
}

/// Values as JSON and errors as `!text`, in order.
fn shown(items: &[Item]) -> Vec<String> {
    items
        .iter()
        .map(|item| match item {
            Item::Value(value) => Value::from(value.clone()).to_string(),
            Item::Error(error) => format!("!{}", error.desc.trim_start_matches("JSON parse error, ")),
        })
        .collect()
}

#[track_caller]
fn check(input: &[u8], expected: &[&str]) {
    assert_eq!(shown(&read(limits(), &[input])), expected, "of {}", String::from_utf8_lossy(input));
}

#[test]
fn values_need_no_newline_between_them() {
    check(b"{\"a\":1}{}[]\"x\"true 12 ", &["{\"a\":1}", "{}", "[]", "\"x\"", "true", "12"]);
}

#[test]
fn a_number_or_keyword_ends_at_the_next_byte() {
    check(b"12", &[]);
    check(b"12\n", &["12"]);
    check(b"null", &[]);
    check(b"null{}", &["null", "{}"]);
}

#[test]
fn single_quotes_quote() {
    check(b"{'a': 'it\\'s \"x\"'}", &["{\"a\":\"it's \\\"x\\\"\"}"]);
}

#[test]
fn escapes_and_surrogate_pairs_are_undone() {
    check(br#""\b\f\n\r\t\/\\\"\u0041\uD83D\uDE00\u0000""#, &["\"\\b\\f\\n\\r\\t/\\\\\\\"A😀\\u0000\""]);
    check(b"\"\xC0\x80\"", &["\"\\u0000\""]);
}

#[test]
fn numbers_beyond_64_bits_become_doubles() {
    check(
        b"[9223372036854775807,18446744073709551615,18446744073709551616,-1.5e3]",
        &["[9223372036854775807,18446744073709551615,1.8446744073709552e+19,-1500.0]"],
    );
    check(b"[1e999,-1e999]", &["[1.7976931348623157e+308,-1.7976931348623157e+308]"]);
}

#[test]
fn errors_have_the_words_of_qemu_ga() {
    check(b"{\"a\":1,\"a\":2}", &["!duplicate key"]);
    check(b"\"\\q\"", &["!invalid escape sequence in string"]);
    check(b"\"\\uZZZZ\"", &["!\\uZZZZ is not a valid Unicode character"]);
    check(b"\"\\u12\"", &["!\\u12\" is not a valid Unicode character"]);
    check(b"'\\u'", &["!\\u' is not a valid Unicode character"]);
    check(b"\"\\ud83d\"", &["!\\ud83d is not a valid Unicode character"]);
    check(b"\"\xC3(\"", &["!invalid UTF-8 sequence in string"]);
    check(b"nope ", &["!invalid keyword 'nope'"]);
    check(b"}", &["!expecting value"]);
    check(b"{1:2}", &["!expecting key"]);
    check(b"{\"a\" 2}", &["!expecting ':'"]);
    check(b"{\"a\":}", &["!expecting value"]);
    check(b"{\"a\":1 2}", &["!expected ',' or '}'"]);
    check(b"[1 2]", &["!expected ',' or ']'"]);
    check(b"[1,]", &["!expecting value"]);
}

#[test]
fn a_broken_message_is_answered_once_and_the_next_is_read() {
    check(b"{\"a\" 2, [{}]} {\"b\":1}", &["!expecting ':'", "{\"b\":1}"]);
    check(b"{]{}", &["!expecting key", "{}"]);
}

#[test]
fn a_stray_byte_in_a_message_that_was_answered_ends_it_without_a_word() {
    check(b"{1 \xFF{}", &["!expecting key", "{}"]);
    check(b"{1 & & {}", &["!expecting key", "{}"]);
    check(b"{1 \xFF\xFF{}", &["!expecting key", "!stray '\u{FFFD}'", "{}"]);
    check(b"[[1 2] & ]", &["!expected ',' or ']'", "!expecting value"]);
}

#[test]
fn a_stray_byte_skips_to_the_next_structure_or_control_byte() {
    check(b"{\"a\": \\ junk 1 x\n{}", &["!stray '\\'", "{}"]);
    check(b"01 2 3\n{}", &["!stray '01'", "{}"]);
    check(b"0e1 {}", &["0", "!invalid keyword 'e'", "1", "{}"]);
    check(b"&abc{}", &["!stray '&'", "{}"]);
    check(b"&\tabc\n5\n", &["!stray '&'", "5"]);
}

#[test]
fn a_newline_inside_a_string_is_stray_and_between_tokens_is_blank() {
    check(b"{\"a\n{}", &["!stray '\"a\n'", "{}"]);
    check(b"{\n\"a\"\n:\n1\n}", &["{\"a\":1}"]);
}

#[test]
fn the_byte_ff_drops_what_was_begun_and_is_answered_once() {
    check(b"{\"a\": [1, \xFF{}", &["!stray '\u{FFFD}'", "{}"]);
    check(b"{\"a\xFF{}", &["!stray '\"a\u{FFFD}'", "{}"]);
    check(b"\xFF\n{}", &["!stray '\u{FFFD}'", "{}"]);
}

#[test]
fn d26_a_broken_limit_is_answered_once_and_the_rest_of_the_message_is_passed_over() {
    let small = || Limits { token_bytes_max: 8, tokens_max: 6, depth_max: 2, error_position: false };
    let read = |input: &[u8]| shown(&read(small(), &[input]));
    assert_eq!(read(b"\"123456789\" {}"), ["!JSON token size limit exceeded", "{}"]);
    assert_eq!(read(b"\"1234567\\\"89\\\\\" {}"), ["!JSON token size limit exceeded", "{}"]);
    assert_eq!(read(b"{\"a\":'123456789', \"b\": [1, \"}\"]} {}"), ["!JSON token size limit exceeded", "{}"]);
    assert_eq!(read(b"[12345,678] {}"), ["!JSON token size limit exceeded", "{}"]);
    assert_eq!(read(b"[1,2,3,4,5,6,7] {}"), ["!JSON token count limit exceeded", "{}"]);
    assert_eq!(read(b"[[[{}], 1]] {}"), ["!JSON nesting depth limit exceeded", "{}"]);
    assert_eq!(
        read(b"[[[\xFF{}"),
        ["!JSON nesting depth limit exceeded", "{}"],
        "0xFF ends it without a word"
    );
    assert_eq!(read(b"\"123456789\xFF{}"), ["!JSON token size limit exceeded", "{}"]);
    assert_eq!(read(b"\"123456789\n{}"), ["!JSON token size limit exceeded", "{}"]);
    assert_eq!(read(b"[[[]]]\xFF{}"), ["!JSON nesting depth limit exceeded", "!stray '\u{FFFD}'", "{}"]);
    assert_eq!(read(b"[[[]]] {}\xFF"), ["!JSON nesting depth limit exceeded", "{}", "!stray '\u{FFFD}'"]);
    assert_eq!(read(b"[[[ {\"1\n{}"), ["!JSON nesting depth limit exceeded", "{}"], "so does any stray byte");
}

#[test]
fn limits_count_what_was_written_and_errors_show_it() {
    let read = |token_bytes_max, input: &[u8]| {
        shown(&read(Limits { token_bytes_max, error_position: false, ..Limits::default() }, &[input]))
    };
    assert_eq!(read(15, b"'AAAAAAAAAAAA'"), ["\"AAAAAAAAAAAA\""]);
    assert_eq!(read(14, b"'AAAAAAAAAAAA'"), ["!JSON token size limit exceeded"]);
    assert_eq!(read(99, b"'AAAAAAAAAAAA\n"), ["!stray ''AAAAAAAAAAAA\n'"]);
    assert_eq!(read(99, b"{'AAAAAAAAAAAA':1,'AAAAAAAAAAAA':2}"), ["!duplicate key"]);
    let long = [&b"'"[..], &[b'A'; 400], b"\n"].concat();
    assert_eq!(read(999, &long), [format!("!stray ''{}'", "A".repeat(255))]);
}

#[test]
fn deep_nesting_up_to_the_limit_is_read() {
    let deep = [vec![b'['; 1024], vec![b']'; 1024]].concat();
    assert!(matches!(read(limits(), &[&deep])[..], [Item::Value(_)]));
    let deeper = [vec![b'['; 1025], vec![b']'; 1025]].concat();
    assert!(matches!(&read(limits(), &[&deeper])[0], Item::Error(error) if error.desc.contains("nesting")));
}

#[test]
fn a_position_counts_lines_and_columns_over_the_life_of_the_stream() {
    let items = read(Limits::default(), &[b"{}\n  {\"a\"", b" 2}\n&"]);
    let Item::Error(first) = &items[1] else { panic!("{items:?}") };
    assert_eq!(first.desc, "2:8: JSON parse error, expecting ':'");
    let Item::Error(second) = &items[2] else { panic!("{items:?}") };
    assert_eq!(second.desc, "3:1: JSON parse error, stray '&'");
}

#[test]
fn a_reset_forgets_an_unfinished_message() {
    let mut reader = Reader::new(limits());
    let mut part: &[u8] = b"{\"execute\": \"gue";
    assert_eq!(reader.next(&mut part), None);
    reader.reset();
    let mut whole: &[u8] = b"{}";
    assert_eq!(reader.next(&mut whole), Some(Item::Value(json!({}).into())));
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e300..1e300).prop_map(Value::from),
        "[ -~\\n\\t\u{e9}\u{1F600}\u{0}]{0,12}".prop_map(Value::from),
        "[A-Za-z0-9+/]{0,40}=?\\n?".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-z\u{20AC}\"]{0,4}", inner, 0..5)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(value in value()) {
        let mut bytes = Vec::new();
        crate::json::encode(&value, &mut bytes);
        prop_assert!(bytes.iter().all(|byte| (0x20..0x7F).contains(byte)));
        bytes.push(b'\n');
        let items = read(limits(), &[&bytes]);
        prop_assert_eq!(items.len(), 1);
        let Item::Value(back) = &items[0] else { panic!("{items:?}") };
        // A double without a fraction comes back as a whole number; its bytes are the same.
        let mut again = Vec::new();
        crate::json::encode(&Value::from(back.clone()), &mut again);
        again.push(b'\n');
        prop_assert_eq!(again, bytes);
    }

    #[test]
    fn pieces_do_not_change_what_is_read(
        input in prop_oneof![
            "[{}\\[\\]:,\"'\\\\ a-e0-9\\-.\\n\\t\u{e9}]{0,60}".prop_map(String::into_bytes),
            r#"([{}\[\]:,]{0,2}"[a-e]{0,20}[\\\n]?[a-e]{0,20}"?){0,6}"#.prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..60),
        ],
        cut in any::<prop::sample::Index>(),
    ) {
        let whole = read(Limits::default(), &[&input]);
        let at = cut.index(input.len() + 1);
        prop_assert_eq!(&read(Limits::default(), &[&input[..at], &input[at..]]), &whole);
        let single: Vec<&[u8]> = input.chunks(1).collect();
        prop_assert_eq!(&read(Limits::default(), &single), &whole);
    }
}
