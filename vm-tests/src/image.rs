//! Where the guest's kernel, disks and programs lie: made by `cargo xtask guest`, cached outside the checkout.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The cached guest image and the programs delivered beside it.
#[derive(Clone, Debug)]
pub struct Image {
    folder: PathBuf,
    agent: PathBuf,
    load: PathBuf,
}

impl Image {
    /// The image `debian-12-postgresql` with today's agent and load, built if they are not there yet (minutes, the first
    /// time).
    ///
    /// `cargo xtask test` builds them first and names them in `STILLPOINT_GUEST`; without that variable this asks
    /// `cargo xtask guest` itself.
    ///
    /// # Panics
    /// If they can neither be found nor built; what was printed says why.
    pub fn get() -> &'static Self {
        static IMAGE: OnceLock<Image> = OnceLock::new();
        IMAGE.get_or_init(|| {
            let text = std::env::var("STILLPOINT_GUEST").unwrap_or_else(|_| ask_xtask("guest"));
            let member = |name: &str| member(&text, name);
            Self { folder: member("image"), agent: member("agent"), load: member("load") }
        })
    }

    /// The cache folder that holds everything below.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Debian's cloud kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// busybox and the modules; the overlay with agent and load is appended to it for each guest.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd.img")
    }

    /// The root disk, ext4 labelled `guest-root`, raw and sparse, 2 GiB. Never opened for writing.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.join("root.raw")
    }

    /// The data disk, xfs labelled `guest-data` with the PostgreSQL cluster, raw and sparse, 2 GiB. Never opened for writing.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.join("data.raw")
    }

    /// Our agent, static.
    #[must_use]
    pub fn agent(&self) -> &Path {
        &self.agent
    }

    /// The load program (`src/bin/load.rs`), static.
    #[must_use]
    pub fn load(&self) -> &Path {
        &self.load
    }
}

/// One of the paths that `cargo xtask` prints, a line `NAME=PATH` each.
pub(crate) fn member(text: &str, name: &str) -> PathBuf {
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
    PathBuf::from(line.unwrap_or_else(|| panic!("`cargo xtask` does not name its {name}: {text}")))
}

/// What `cargo xtask COMMAND` prints.
pub(crate) fn ask_xtask(command: &str) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["run", "--quiet", "--package", "xtask", "--", command])
        .current_dir(checkout())
        .stderr(std::process::Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("cargo does not start: {error}"));
    assert!(output.status.success(), "`cargo xtask {command}` failed: {}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The checkout that cargo runs this for. Asked now and not when it was built: checkouts share the target folder, and this
/// may have been built from another.
pub fn checkout() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR");
    manifest.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from).join("..")
}
