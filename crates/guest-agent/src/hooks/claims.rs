//! What a hook says that it quiesced, in lines among its output.
//!
//! ```text
//! stillpoint: quiesced KIND DATA-FOLDER
//! stillpoint: files PATH
//! stillpoint: locked
//! stillpoint: position TEXT
//! ```
//! `quiesced` begins a claim, the others belong to the one before. Other lines that begin so are errors, and are said.

use guest_protocol::stillpoint::Policy;
use std::path::PathBuf;

/// Most claims of one hook.
const CLAIMS_MAX: usize = 64;
/// Most further places of one claim.
const FILES_MAX: usize = 64;
/// Longest line that is looked at, in bytes.
pub(super) const LINE_BYTES_MAX: usize = 2048;
/// Longest kind and position, in bytes.
const WORD_BYTES_MAX: usize = 256;
/// How such a line begins.
pub(super) const MARK: &str = "stillpoint:";

/// An application that a hook says it quiesced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The hook's path.
    pub hook: String,
    /// Kind, e.g. `mysql`.
    pub kind: String,
    /// Its data folder.
    pub instance: PathBuf,
    /// Where else its files lie.
    pub files: Vec<PathBuf>,
    /// It holds its writers out, with a lock.
    pub locked: bool,
    /// Log position, in its own notation.
    pub position: Option<String>,
    /// Superblocks (`MAJOR:MINOR`) that hold its files.
    pub device_numbers: Vec<String>,
    /// What the run's policies say of it.
    pub policy: Policy,
}

/// Claims in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    pub(super) made: Vec<Claim>,
    pub(super) complaints: Vec<String>,
}

impl Claims {
    /// Takes one line of output.
    pub(super) fn line(&mut self, line: &[u8]) {
        let Some(rest) = line.strip_prefix(MARK.as_bytes()) else { return };
        let told = String::from_utf8_lossy(rest).trim().to_owned();
        let taken = if std::str::from_utf8(rest).is_ok() { self.take(&told) } else { Err("it is no UTF-8") };
        if let Err(why) = taken
            && self.complaints.len() < CLAIMS_MAX
        {
            self.complaints.push(format!("its line \"{MARK} {told}\" counts for nothing: {why}"));
        }
    }

    fn take(&mut self, told: &str) -> Result<(), &'static str> {
        let (word, rest) = told.split_once(char::is_whitespace).unwrap_or((told, ""));
        let rest = rest.trim_start();
        if word == "quiesced" {
            let (kind, instance) = rest.split_once(char::is_whitespace).ok_or("it names no data folder")?;
            let named = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if kind.len() > WORD_BYTES_MAX || !kind.bytes().all(named) {
                return Err("its kind is no word");
            }
            if self.made.len() >= CLAIMS_MAX {
                return Err("there are too many");
            }
            let instance = path(instance.trim_start())?;
            self.made.push(Claim { kind: kind.to_owned(), instance, ..Claim::default() });
            return Ok(());
        }
        let claim = self.made.last_mut().ok_or("nothing was said to be quiesced before it")?;
        match word {
            "files" if claim.files.len() >= FILES_MAX => return Err("there are too many"),
            "files" => claim.files.push(path(rest)?),
            "locked" if rest.is_empty() => claim.locked = true,
            "position" if !rest.is_empty() && rest.len() <= WORD_BYTES_MAX => {
                claim.position = Some(rest.to_owned());
            }
            _ => return Err("it is not understood"),
        }
        Ok(())
    }
}

fn path(text: &str) -> Result<PathBuf, &'static str> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("its path does not begin with /") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Claims {
        let mut claims = Claims::default();
        lines.iter().for_each(|line| claims.line(line.as_bytes()));
        claims
    }

    #[test]
    fn a_claim_is_read_from_lines_among_others() {
        let claims = read(&[
            "locking …",
            "stillpoint: quiesced mysql /var/lib/my sql",
            "stillpoint: files /srv/log",
            "stillpoint: locked",
            "stillpoint:  position  binlog.000007:154",
            "done",
            "stillpoint: quiesced app /srv/app",
        ]);
        assert_eq!(claims.complaints, [""; 0]);
        let [mysql, app] = &claims.made[..] else { panic!("{:?}", claims.made) };
        assert_eq!((mysql.kind.as_str(), mysql.instance.to_str()), ("mysql", Some("/var/lib/my sql")));
        assert_eq!((mysql.files.len(), mysql.locked), (1, true));
        assert_eq!(mysql.position.as_deref(), Some("binlog.000007:154"));
        assert_eq!((app.locked, &app.position), (false, &None));
    }

    #[test]
    fn what_is_not_understood_is_said_and_counts_for_nothing() {
        for line in [
            "stillpoint: locked",
            "stillpoint: quiesced",
            "stillpoint: quiesced mysql",
            "stillpoint: quiesced mysql var/lib/mysql",
            "stillpoint: quiesced my;sql /var/lib/mysql",
            "stillpoint: level application",
        ] {
            let claims = read(&[line]);
            assert_eq!((claims.made.len(), claims.complaints.len()), (0, 1), "{line}");
        }
        let mut claims = read(&["stillpoint: quiesced a /a"]);
        claims.line(b"stillpoint: files /\xFF");
        assert_eq!((claims.made[0].files.len(), claims.complaints.len()), (0, 1));
    }

    #[test]
    fn claims_are_bounded() {
        let claims = read(&["stillpoint: quiesced a /a"; 100]);
        assert_eq!(claims.made.len(), CLAIMS_MAX);
        let claims = read(&["stillpoint: nonsense"; 1000]);
        assert_eq!(claims.complaints.len(), CLAIMS_MAX);
    }
}
