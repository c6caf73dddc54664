//! Homes of a user that is not us, in a folder of our own. Takes root, as becoming a user does.

use super::{add, get, remove};
use guest_protocol::arguments::accounts::AuthorizedKeys;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const ALICE: u32 = 61_234;
const KEY: &str = "ssh-ed25519 AAAA alice@example";

/// A root with `/etc/passwd` and alice's home.
struct Root(tempfile::TempDir);

impl Root {
    /// Nothing, with a word about it, where we may not become alice.
    fn new() -> Option<Root> {
        if !rustix::process::geteuid().is_root() {
            writeln!(std::io::stderr(), "SKIPPED: only root becomes another user").expect("a standard error");
            return None;
        }
        let root = Root(tempfile::tempdir().expect("a folder"));
        fs::set_permissions(root.0.path(), fs::Permissions::from_mode(0o755)).expect("changed");
        fs::create_dir_all(root.path("etc")).expect("created");
        fs::create_dir_all(root.path("home")).expect("created");
        let passwd = format!("root:x:0:0::/root:/bin/sh\nalice:x:{ALICE}:{ALICE}::/home/alice:/bin/sh\n");
        fs::write(root.path("etc/passwd"), passwd).expect("written");
        fs::write(root.path("etc/group"), "users:x:100:alice\n").expect("written");
        root.folder("home/alice", ALICE, 0o700);
        Some(root)
    }

    fn path(&self, place: &str) -> PathBuf {
        self.0.path().join(place)
    }

    fn folder(&self, place: &str, owner: u32, mode: u32) {
        fs::create_dir(self.path(place)).expect("created");
        chown(self.path(place), Some(owner), Some(owner)).expect("given");
        fs::set_permissions(self.path(place), fs::Permissions::from_mode(mode)).expect("changed");
    }

    fn file(&self, place: &str, owner: u32, mode: u32, text: &str) {
        fs::write(self.path(place), text).expect("written");
        chown(self.path(place), Some(owner), Some(owner)).expect("given");
        fs::set_permissions(self.path(place), fs::Permissions::from_mode(mode)).expect("changed");
    }

    fn read(&self, place: &str) -> String {
        fs::read_to_string(self.path(place)).expect("a file")
    }

    /// In a thread of its own, as the agent does it.
    fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, guest_protocol::Error> + Send + 'static,
    ) -> Result<T, String> {
        let root = self.0.path().to_owned();
        let thread = std::thread::spawn(move || work(&root));
        thread.join().expect("it does not panic").map_err(|error| error.desc)
    }

    fn add(&self, key: &str, reset: bool) -> Result<(), String> {
        let arguments = arguments(key, reset);
        self.call(move |root| add(root, &arguments)).map(drop)
    }

    fn remove(&self, key: &str) -> Result<(), String> {
        let arguments = arguments(key, false);
        self.call(move |root| remove(root, &arguments)).map(drop)
    }

    fn get(&self) -> Result<Vec<String>, String> {
        self.call(|root| get(root, "alice")).map(|keys| keys.keys)
    }

    fn mode(&self, place: &str) -> (u32, u32) {
        let stat = fs::symlink_metadata(self.path(place)).expect("it is there");
        (stat.uid(), stat.mode() & 0o777)
    }
}

fn arguments(key: &str, reset: bool) -> AuthorizedKeys {
    AuthorizedKeys { username: "alice".to_owned(), keys: vec![key.to_owned()], reset }
}

#[test]
fn a_first_key_makes_a_folder_and_a_file_that_are_the_users_own() {
    let Some(root) = Root::new() else { return };
    root.add(KEY, false).expect("added");
    assert_eq!(root.mode("home/alice/.ssh"), (ALICE, 0o700));
    assert_eq!(root.mode("home/alice/.ssh/authorized_keys"), (ALICE, 0o600));
    assert_eq!(root.read("home/alice/.ssh/authorized_keys"), KEY);
    root.add("ssh-rsa BBBB", false).expect("added");
    assert_eq!(root.get(), Ok(vec!["ssh-rsa BBBB".to_owned(), KEY.to_owned()]));
    root.remove("ssh-rsa BBBB").expect("removed");
    assert_eq!(root.get(), Ok(vec![KEY.to_owned()]));
    root.add("ssh-rsa CCCC", true).expect("reset");
    assert_eq!(root.read("home/alice/.ssh/authorized_keys"), "ssh-rsa CCCC");
    assert_eq!(
        fs::read_dir(root.path("home/alice/.ssh")).expect("a folder").count(),
        1,
        "nothing else is left"
    );
}

#[test]
fn without_a_file_there_are_no_keys_to_get_and_none_to_remove() {
    let Some(root) = Root::new() else { return };
    let file = "/home/alice/.ssh/authorized_keys";
    let words = format!(
        "failed to read '{file}': Failed to open file \u{201C}{file}\u{201D}: No such file or directory"
    );
    assert_eq!(root.get(), Err(words));
    assert_eq!(root.remove(KEY), Ok(()));
    assert!(!root.path("home/alice/.ssh").exists());
    fs::remove_dir(root.path("home/alice")).expect("removed");
    let words = "failed to create directory '/home/alice/.ssh': No such file or directory";
    assert_eq!(root.add(KEY, false), Err(words.to_owned()));
}

#[test]
fn d29_a_folder_that_is_a_link_is_not_followed() {
    let Some(root) = Root::new() else { return };
    root.folder("target", 0, 0o777);
    root.file("target/authorized_keys", 0, 0o666, "root's key");
    symlink(root.path("target"), root.path("home/alice/.ssh")).expect("linked");
    for refused in [root.add(KEY, false), root.add(KEY, true), root.remove(KEY), root.get().map(drop)] {
        assert!(refused.as_ref().is_err_and(|words| words.ends_with("Not a directory")), "{refused:?}");
    }
    assert_eq!(root.mode("target"), (0, 0o777));
    assert_eq!(root.mode("target/authorized_keys"), (0, 0o666));
    assert_eq!(root.read("target/authorized_keys"), "root's key");
}

#[test]
fn d29_a_file_that_is_a_link_is_not_followed_and_a_reset_replaces_the_link() {
    let Some(root) = Root::new() else { return };
    root.file("target", 0, 0o666, "root's file");
    root.folder("home/alice/.ssh", ALICE, 0o700);
    symlink(root.path("target"), root.path("home/alice/.ssh/authorized_keys")).expect("linked");
    for refused in [root.add(KEY, false), root.remove(KEY), root.get().map(drop)] {
        assert!(
            refused.as_ref().is_err_and(|words| words.ends_with("levels of symbolic links")),
            "{refused:?}"
        );
    }
    root.add(KEY, true).expect("the link is the user's to lose");
    assert_eq!((root.mode("target"), root.read("target").as_str()), ((0, 0o666), "root's file"));
    assert_eq!(root.mode("home/alice/.ssh/authorized_keys"), (ALICE, 0o600));
}

#[test]
fn d29_what_the_user_may_not_do_is_not_done() {
    let Some(root) = Root::new() else { return };
    // A home that is root's: alice may not make a folder there.
    fs::remove_dir(root.path("home/alice")).expect("removed");
    root.folder("home/alice", 0, 0o755);
    let words = "failed to create directory '/home/alice/.ssh': Permission denied";
    assert_eq!(root.add(KEY, false), Err(words.to_owned()));
    // A folder of root's: alice may neither read what is for root only nor write.
    root.folder("home/alice/.ssh", 0, 0o755);
    root.file("home/alice/.ssh/authorized_keys", 0, 0o600, "root's key");
    assert!(root.get().is_err_and(|words| words.ends_with("Permission denied")));
    assert!(root.add(KEY, true).is_err_and(|words| words.ends_with("Permission denied")));
    assert_eq!(root.read("home/alice/.ssh/authorized_keys"), "root's key");
}

#[test]
fn d29_a_pipe_in_the_place_of_the_file_holds_up_nobody() {
    let Some(root) = Root::new() else { return };
    root.folder("home/alice/.ssh", ALICE, 0o700);
    let pipe = root.path("home/alice/.ssh/authorized_keys");
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).expect("a pipe");
    fs::set_permissions(&pipe, fs::Permissions::from_mode(0o666)).expect("changed");
    assert!(root.get().is_err_and(|words| words.ends_with("Invalid argument")));
    root.add(KEY, true).expect("a reset puts a file in its place");
    assert_eq!(root.get(), Ok(vec![KEY.to_owned()]));
}

#[test]
fn what_is_no_key_or_no_user_is_refused_before_anything_is_touched() {
    let Some(root) = Root::new() else { return };
    let refused = root.add("# comment", true);
    assert_eq!(refused, Err("invalid OpenSSH public key: '# comment'".to_owned()));
    let nobody =
        AuthorizedKeys { username: "nobody-has-this-name".to_owned(), keys: Vec::new(), reset: true };
    let refused = root.call(move |root| add(root, &nobody)).map(drop);
    assert_eq!(refused, Err("failed to lookup user 'nobody-has-this-name': No such user".to_owned()));
    assert!(!root.path("home/alice/.ssh").exists());
}
