//! Where the repository's passphrase or key comes from: never from an argument.

use crate::explain::{Exit, Explanation};
use repository::Secret;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longest passphrase, in bytes; a larger file is not a passphrase file.
const PASSPHRASE_BYTES_MAX: u64 = 4096;

/// File in the service manager's credential folder. Source: systemd.exec(5), `LoadCredential=`.
const CREDENTIAL: &str = "stillpoint-passphrase";

/// Takes the secret from, in this order: the key file, the passphrase file, the service manager, the terminal.
/// `twice`: a new passphrase is asked for a second time.
pub(crate) fn find(
    key: Option<&Path>,
    passphrase: Option<&Path>,
    twice: bool,
) -> Result<Secret, Explanation> {
    if let Some(key) = key {
        return Ok(Secret::KeyFile(key.to_owned()));
    }
    let credential =
        std::env::var_os("CREDENTIALS_DIRECTORY").map(|folder| PathBuf::from(folder).join(CREDENTIAL));
    if let Some(file) = passphrase.map(Path::to_owned).or_else(|| credential.filter(|file| file.exists())) {
        return read(&file).map(Secret::Passphrase);
    }
    if !std::io::stdin().is_terminal() {
        return Err(Explanation::new(
            Exit::Usage,
            "the repository's passphrase is not known",
            "there is no terminal to ask at",
            "give --passphrase-file or --key-file (or STILLPOINT_PASSPHRASE_FILE, STILLPOINT_KEY_FILE)",
        ));
    }
    let first = ask("Passphrase of the repository: ")?;
    if twice && *first != *ask("The same again: ")? {
        return Err(Explanation::new(
            Exit::Usage,
            "no repository was made",
            "the two passphrases differ",
            "try again",
        ));
    }
    Ok(Secret::Passphrase(first))
}

fn read(file: &Path) -> Result<Zeroizing<String>, Explanation> {
    let failed = |cause: String| {
        let problem = format!("the passphrase file {} cannot be used", file.display());
        Explanation::new(Exit::Usage, problem, cause, "give a file whose first line is the passphrase")
    };
    let size = std::fs::metadata(file).map_err(|e| failed(e.to_string()))?.len();
    if size > PASSPHRASE_BYTES_MAX {
        return Err(failed(format!("it has {size} bytes")));
    }
    let text = Zeroizing::new(std::fs::read_to_string(file).map_err(|e| failed(e.to_string()))?);
    let line = Zeroizing::new(text.lines().next().unwrap_or_default().to_owned());
    if line.is_empty() { Err(failed("its first line is empty".to_owned())) } else { Ok(line) }
}

fn ask(prompt: &str) -> Result<Zeroizing<String>, Explanation> {
    let answer = rpassword::prompt_password(prompt).map(Zeroizing::new).map_err(|e| {
        Explanation::new(Exit::Usage, "no passphrase was read", e.to_string(), "give --passphrase-file")
    })?;
    if answer.is_empty() {
        return Err(Explanation::new(Exit::Usage, "no passphrase was read", "it was empty", "type one"));
    }
    Ok(answer)
}
