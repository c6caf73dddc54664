//! A second initrd archive with the programs under test, so that a rebuilt agent needs no new image.
//!
//! Format: `newc` of cpio, Linux `Documentation/driver-api/early-userspace/buffer-format.rst`; the kernel unpacks archives
//! that follow each other, later files over earlier ones.

use std::io::{self, Write};

/// Writes cpio archives of plain folders and files, all owned by root.
pub(crate) struct Overlay {
    bytes: Vec<u8>,
    inode: usize,
}

impl Overlay {
    /// An archive with one folder.
    #[must_use]
    pub(crate) fn with_folder(folder: &str) -> Self {
        let mut overlay = Self { bytes: Vec::new(), inode: 1 };
        overlay.entry(folder, 0o040_755, &[]);
        overlay
    }

    /// Adds an executable file; `path` lies in a folder that was added before.
    pub(crate) fn add_program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_755, content);
    }

    /// Adds a file that is no program.
    pub(crate) fn add_file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, 0o100_644, content);
    }

    /// Writes the archive behind the initrd `to` starts with, which must end at a multiple of four bytes.
    ///
    /// # Errors
    /// Those of the writer.
    pub(crate) fn finish(mut self, to: &mut impl Write) -> io::Result<()> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[]);
        to.write_all(&self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        // magic, inode, mode, uid, gid, links, mtime, file size, device (2), special device (2), name size with its NUL, check
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.inode,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            path.len() + 1,
            0
        );
        self.inode += 1;
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_lists_and_unpacks_what_was_packed() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut overlay = Overlay::with_folder("stillpoint");
        overlay.add_program("stillpoint/odd", b"12345");
        overlay.add_program("stillpoint/even", b"12345678");
        let mut archive = Vec::new();
        overlay.finish(&mut archive).expect("memory takes it");
        let mut cpio = Command::new("cpio")
            .args(["--extract", "--quiet", "--make-directories"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio is installed by `cargo xtask setup`");
        cpio.stdin.take().expect("piped").write_all(&archive).expect("cpio reads");
        assert!(cpio.wait().expect("it ends").success());
        assert_eq!(std::fs::read(folder.path().join("stillpoint/odd")).expect("there"), b"12345");
        assert_eq!(std::fs::read(folder.path().join("stillpoint/even")).expect("there"), b"12345678");
    }
}
