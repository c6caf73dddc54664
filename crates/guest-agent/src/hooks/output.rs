//! What a hook writes: its beginning and its end, however much there is, and the claims among it.

use super::claims::{Claim, Claims, LINE_BYTES_MAX};
use std::collections::VecDeque;

/// Kept of the beginning, and again of the end.
const PART_BYTES: usize = 4 << 10;

/// Output in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Output {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    bytes: u64,
    claims: Claims,
    line: Vec<u8>,
}

impl Output {
    /// Takes what was read.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            // A line too long to be one of ours is as good as cut.
            let room = LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                self.end_line();
            }
        }
        let room = PART_BYTES - self.head.len();
        let (head, rest) = bytes.split_at(bytes.len().min(room));
        self.head.extend_from_slice(head);
        let rest = &rest[rest.len().saturating_sub(PART_BYTES)..];
        let over = (self.tail.len() + rest.len()).saturating_sub(PART_BYTES);
        self.tail.drain(..over);
        self.tail.extend(rest);
    }

    fn end_line(&mut self) {
        if self.line.len() < LINE_BYTES_MAX {
            self.claims.line(self.line.trim_ascii_end());
        }
        self.line.clear();
    }

    /// How much there was.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Beginning and end, with a line between them where something is missing.
    pub(super) fn text(&self) -> String {
        let tail: Vec<u8> = self.tail.iter().copied().collect();
        let missing = self.bytes - (self.head.len() + tail.len()) as u64;
        let between = if missing > 0 { format!("\n… {missing} bytes …\n") } else { String::new() };
        format!("{}{between}{}", String::from_utf8_lossy(&self.head), String::from_utf8_lossy(&tail))
    }

    /// Everything that was claimed, and what was wrong with the rest.
    pub(super) fn claims(mut self) -> (Vec<Claim>, Vec<String>) {
        self.end_line();
        (self.claims.made, self.claims.complaints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_much_output_the_beginning_and_the_end_are_kept() {
        let mut output = Output::default();
        output.take(b"begin\n");
        for _ in 0..1000 {
            output.take(&[b'x'; 5000]);
        }
        output.take(b"\nend");
        let text = output.text();
        assert!(text.starts_with("begin\n") && text.ends_with("\nend"), "{}", text.len());
        assert!(text.contains("… 4991818 bytes …"), "{}", &text[4090..4130]);
        assert_eq!(output.bytes(), 5_000_010);
        assert!(output.head.capacity() + output.tail.capacity() + output.line.capacity() < 64 << 10);
    }

    #[test]
    fn little_output_is_kept_as_it_is_however_it_came() {
        let text = "one\ntwo\nstillpoint: quiesced a /a\nthree";
        for size in 1..text.len() {
            let mut output = Output::default();
            text.as_bytes().chunks(size).for_each(|chunk| output.take(chunk));
            assert_eq!(output.text(), text);
            assert_eq!(output.claims().0.len(), 1, "in pieces of {size}");
        }
    }

    #[test]
    fn a_claim_needs_no_newline_at_the_end_and_no_line_may_grow_without_end() {
        let mut output = Output::default();
        output.take(b"stillpoint: quiesced a /a");
        assert_eq!(output.clone().claims().0.len(), 1);
        for _ in 0..100 {
            output.take(&[b'x'; 1000]);
        }
        output.take(b"\nstillpoint: quiesced b /b\n");
        let (claims, _) = output.claims();
        assert_eq!(claims.iter().map(|claim| claim.kind.as_str()).collect::<Vec<_>>(), ["b"]);
    }
}
