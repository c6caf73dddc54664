//! Our NBD server against QEMU's and libnbd's tools, and against clients that misbehave.
#![expect(clippy::disallowed_methods, reason = "a test's own server has room in its queue")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod nbd_peers;

use nbd::{BASE_ALLOCATION, Body, ClientHandshake, ClientTransmission, Decoded, ErrorCode, Session};
use nbd_peers::{PATIENCE, raw_image, run, run_anyhow, uri};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm::nbd_client::{Chunk, NbdClient, NbdClientError, ReadOptions};
use vm::nbd_server::{BlockSource, NbdServer, NbdServerError, ServerOptions};

const MIB: u64 = 1 << 20;

/// A raw file with its holes.
struct RawFile(File);

impl RawFile {
    fn open(path: &Path) -> Arc<Self> {
        Arc::new(Self(File::open(path).unwrap()))
    }
}

impl BlockSource for RawFile {
    fn size_bytes(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<(u64, bool)>> {
        use rustix::fs::{SeekFrom, seek};
        let (mut at, end, mut extents) = (offset, offset + length, Vec::new());
        while at < end && extents.len() < max {
            // A hole reaches to the next data, or to the end if there is none.
            let data = match seek(&self.0, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => self.size_bytes(),
                Err(error) => return Err(error.into()),
            };
            let next = if data > at { data } else { seek(&self.0, SeekFrom::Hole(at))? };
            extents.push((next - at, data > at));
            at = next;
        }
        Ok(extents)
    }
}

struct Served {
    server: NbdServer,
    _folder: TempDir,
}

impl Served {
    fn start(exports: Vec<(String, Arc<dyn BlockSource>)>, options: ServerOptions) -> Self {
        let folder = private_folder();
        let server = NbdServer::start(&folder.path().join("nbd.sock"), exports, options).unwrap();
        Self { server, _folder: folder }
    }

    fn one(source: Arc<dyn BlockSource>, options: ServerOptions) -> Self {
        Self::start(vec![("disk".to_owned(), source)], options)
    }

    fn uri(&self) -> String {
        uri(self.server.socket(), "disk")
    }

    fn connect(&self) -> NbdClient {
        self.try_connect().unwrap()
    }

    fn try_connect(&self) -> Result<NbdClient, NbdClientError> {
        NbdClient::connect(self.server.socket(), "disk", &[BASE_ALLOCATION], PATIENCE)
    }

    fn stop(self) {
        self.server.stop(PATIENCE).unwrap();
    }
}

fn private_folder() -> TempDir {
    tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o700)).tempdir().unwrap()
}

fn read_all(client: &mut NbdClient) -> Result<Vec<u8>, NbdClientError> {
    let size = client.size_bytes();
    let mut disk = vec![0; usize::try_from(size).unwrap()];
    client.read_pipelined::<NbdClientError>(
        std::iter::once(0..size),
        ReadOptions::default(),
        |offset, chunk| {
            if let Chunk::Data(bytes) = chunk {
                let start = usize::try_from(offset).unwrap();
                disk[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Ok(())
        },
    )?;
    Ok(disk)
}

#[test]
fn nbdinfo_sees_the_exports_their_sizes_and_that_they_are_read_only() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 3 * MIB + 512);
    let source: Arc<dyn BlockSource> = RawFile::open(&image);
    let exports = vec![("disk".to_owned(), Arc::clone(&source)), ("second disk".to_owned(), source)];
    let served = Served::start(exports, ServerOptions::default());
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &served.uri()])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 3 * MIB + 512);
    for (fact, value) in [("is_read_only", true), ("can_multi_conn", true), ("can_df", true)] {
        assert_eq!(export[fact], value, "{fact}");
    }
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", "--list", &served.uri()])).unwrap();
    let names: Vec<_> = list["exports"].as_array().unwrap().iter().map(|one| &one["export-name"]).collect();
    assert_eq!(names, ["disk", "second disk"]);
    served.stop();
}

#[test]
fn qemu_img_finds_the_disk_identical_and_converts_it() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 48 * MIB);
    let (image, copy) = (image.to_str().unwrap(), folder.path().join("copy.raw"));
    let served = Served::one(RawFile::open(Path::new(image)), ServerOptions::default());
    let compared = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &served.uri()]);
    assert_eq!(compared.trim(), "Images are identical.");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &served.uri(), copy.to_str().unwrap()]);
    assert!(std::fs::read(image).unwrap() == std::fs::read(&copy).unwrap());
    let map = |what: &str| -> Vec<(u64, u64, bool)> {
        let printed = run("qemu-img", &["map", "--output=json", "-f", "raw", what]);
        let map: serde_json::Value = serde_json::from_str(&printed).unwrap();
        let parts = map.as_array().unwrap().iter();
        parts
            .map(|part| {
                (part["start"].as_u64().unwrap(), part["length"].as_u64().unwrap(), part["zero"] == true)
            })
            .collect()
    };
    assert_eq!(map(&served.uri()), map(image));
    assert!(map(image).len() > 10);
    served.stop();
}

#[test]
fn nbdcopy_gets_every_byte_over_one_connection_and_over_four() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 48 * MIB);
    let served = Served::one(RawFile::open(&image), ServerOptions::default());
    for connections in ["--connections=1", "--connections=4"] {
        let copy = folder.path().join("copy.raw");
        run("nbdcopy", &[connections, "--requests=16", &served.uri(), copy.to_str().unwrap()]);
        assert!(std::fs::read(&image).unwrap() == std::fs::read(&copy).unwrap(), "{connections}");
        std::fs::remove_file(&copy).unwrap();
    }
    served.stop();
}

#[test]
fn our_own_client_reads_what_our_server_serves() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 48 * MIB);
    let served = Served::one(RawFile::open(&image), ServerOptions::default());
    assert!(read_all(&mut served.connect()).unwrap() == std::fs::read(&image).unwrap());
    served.stop();
}

/// QEMU's tools forgive a second extent, but the protocol does not allow it.
#[test]
fn a_client_that_asks_for_one_extent_gets_one_and_others_get_all() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::one(RawFile::open(&raw_image(folder.path(), 8 * MIB)), ServerOptions::default());
    let mut stream = UnixStream::connect(served.server.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut handshake = ClientHandshake::open("disk", &[BASE_ALLOCATION]).unwrap();
    let (mut received, mut out) = (Vec::new(), Vec::new());
    loop {
        let decoded = handshake.decode(&received, &mut out).unwrap();
        stream.write_all(&std::mem::take(&mut out)).unwrap();
        match decoded {
            Decoded::More(wanted) => {
                let before = received.len();
                received.resize(wanted, 0);
                stream.read_exact(&mut received[before..]).unwrap();
            }
            Decoded::Ready(_, Some(_)) => break,
            Decoded::Ready(consumed, None) => drop(received.drain(..consumed)),
        }
    }
    let mut payload_bytes = |flags: u8| {
        let request = [&[0x25, 0x60, 0x95, 0x13, 0, flags, 0, 7][..], &[9; 8], &[0; 8], &[0, 0x80, 0, 0]];
        stream.write_all(&request.concat()).unwrap();
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; length as usize]).unwrap();
        length
    };
    assert_eq!(payload_bytes(1 << 3), 4 + 8);
    assert!(payload_bytes(0) > 4 + 10 * 8);
    served.stop();
}

#[test]
fn nothing_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), MIB);
    let served = Served::one(RawFile::open(&image), ServerOptions::default());
    let before = std::fs::read(&image).unwrap();
    let output = run_anyhow("qemu-io", &["-f", "raw", "-c", "write 0 4096", &served.uri()]);
    assert!(!output.status.success());
    assert!(before == std::fs::read(&image).unwrap());
    served.stop();
}

/// A client that does what it likes: the oldest handshake, then requests by hand.
struct Plain(UnixStream);

impl Plain {
    fn open(served: &Served) -> (Self, ClientTransmission) {
        let mut stream = UnixStream::connect(served.server.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
            .write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 4], b"disk"].concat())
            .unwrap();
        let mut greeting = [0; 28];
        stream.read_exact(&mut greeting).unwrap();
        let session = Session {
            size_bytes: u64::from_be_bytes(greeting[18..26].try_into().unwrap()),
            flags: 0,
            structured: false,
            read_bytes_max: 32 << 20,
            contexts: Vec::new(),
        };
        (Self(stream), ClientTransmission::new(session))
    }
}

#[test]
fn a_client_without_structured_replies_gets_the_same_bytes_up_to_32_mib_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 33 * MIB);
    let content = std::fs::read(&image).unwrap();
    let served = Served::one(RawFile::open(&image), ServerOptions::default());
    let (Plain(mut stream), mut transmission) = Plain::open(&served);
    let mut out = Vec::new();
    transmission.read(0, 32 << 20, &mut out).unwrap();
    transmission.read(MIB / 2, 32 << 20, &mut out).unwrap();
    transmission.read(33 * MIB - 5, 5, &mut out).unwrap();
    stream.write_all(&out).unwrap();
    let mut received = Vec::new();
    for _ in 0..3 {
        loop {
            match transmission.decode(&received).unwrap() {
                Decoded::More(wanted) => {
                    let before = received.len();
                    received.resize(wanted, 0);
                    stream.read_exact(&mut received[before..]).unwrap();
                }
                Decoded::Ready(consumed, reply) => {
                    let Body::Data { offset, bytes } = reply.body else { panic!("{:?}", reply.body) };
                    let start = usize::try_from(offset).unwrap();
                    assert!(bytes == &content[start..start + bytes.len()]);
                    received.drain(..consumed);
                    break;
                }
            }
        }
    }
    assert_eq!(transmission.in_flight(), 0);
    served.stop();
}

/// A disk whose behaviour a test decides.
struct Staged<F>(u64, F);

impl<F: Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync> BlockSource for Staged<F> {
    fn size_bytes(&self) -> u64 {
        self.0
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1(offset, buf)
    }

    fn extents(&self, _offset: u64, length: u64, _max: usize) -> io::Result<Vec<(u64, bool)>> {
        Ok(vec![(length, false)])
    }
}

#[test]
fn a_slow_read_does_not_hold_up_the_ones_behind_it() {
    let arrived = Arc::new((Mutex::new(0), Condvar::new()));
    let seen = Arc::clone(&arrived);
    // The disk's beginning is not ready until the client has received three other chunks.
    let source = Staged(8 * MIB, move |offset, buf: &mut [u8]| {
        if offset == 0 {
            let (chunks, changed) = &*seen;
            let waited = changed.wait_timeout_while(chunks.lock().unwrap(), PATIENCE, |chunks| *chunks < 3);
            assert!(!waited.unwrap().1.timed_out(), "requests are answered one after the other");
        }
        buf.fill(7);
        Ok(())
    });
    let served = Served::one(Arc::new(source), ServerOptions::default());
    let mut order = Vec::new();
    let whole = std::iter::once(0..8 * MIB);
    let note = |offset, _: Chunk<'_>| {
        order.push(offset);
        *arrived.0.lock().unwrap() += 1;
        arrived.1.notify_all();
        Ok(())
    };
    served.connect().read_pipelined::<NbdClientError>(whole, ReadOptions::default(), note).unwrap();
    assert!(order.iter().position(|offset| *offset == 0).unwrap() >= 3, "{order:?}");
    served.stop();
}

#[test]
fn a_slow_disk_is_waited_for_request_by_request_and_a_caller_may_be_slow_too() {
    let source = Staged(4 * MIB, |_, buf: &mut [u8]| {
        std::thread::sleep(Duration::from_millis(250));
        buf.fill(1);
        Ok(())
    });
    let served = Served::one(Arc::new(source), ServerOptions::default());
    let read = |timeout, pause: Duration| {
        let mut client = NbdClient::connect(served.server.socket(), "disk", &[], timeout).unwrap();
        let options = ReadOptions { in_flight: 1, ..ReadOptions::default() };
        client.read_pipelined::<NbdClientError>(std::iter::once(0..4 * MIB), options, |_, _| {
            std::thread::sleep(pause);
            Ok(())
        })
    };
    // Eight requests of 250 ms each take longer than the timeout, but no single one does.
    read(Duration::from_millis(1500), Duration::ZERO).unwrap();
    read(Duration::from_millis(1500), Duration::from_millis(200)).unwrap();
    let hasty = read(Duration::from_millis(100), Duration::ZERO);
    assert!(matches!(hasty, Err(NbdClientError::TimedOut(_))), "{hasty:?}");
    served.stop();
}

#[test]
fn a_failing_disk_is_told_with_a_code_and_without_words_of_the_host() {
    let source = Staged(8 * MIB, |offset, buf: &mut [u8]| {
        if offset >= 5 * MIB {
            return Err(io::Error::other("pack /secret/place is damaged"));
        }
        buf.fill(1);
        Ok(())
    });
    let served = Served::one(Arc::new(source), ServerOptions::default());
    let error = read_all(&mut served.connect()).unwrap_err();
    assert!(matches!(&error, NbdClientError::Refused { code: ErrorCode::IO, .. }), "{error}");
    assert!(!error.to_string().contains("secret"), "{error}");
    // The server goes on, and QEMU's tools see an error too.
    let output = run_anyhow("qemu-io", &["-r", "-f", "raw", "-c", "read 5M 1M", &served.uri()]);
    assert!(!output.status.success());
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 0 1M", &served.uri()]);
    served.stop();
}

/// Waits until the server hangs up.
fn hung_up(mut stream: UnixStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).unwrap();
    let began = Instant::now();
    let mut buffer = [0; 65_536];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) if began.elapsed() < within => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return true,
            _ => return false,
        }
    }
}

#[test]
fn a_client_that_never_reads_is_hung_up_on_and_others_are_served_meanwhile() {
    let source = Staged(64 * MIB, |_, buf: &mut [u8]| {
        buf.fill(3);
        Ok(())
    });
    let options = ServerOptions { client_timeout: Duration::from_millis(800), ..ServerOptions::default() };
    let served = Served::one(Arc::new(source), options);
    let (Plain(mut lazy), mut transmission) = Plain::open(&served);
    let mut out = Vec::new();
    for _ in 0..60 {
        transmission.read(0, 32 << 20, &mut out).unwrap();
    }
    lazy.write_all(&out).unwrap();
    let began = Instant::now();
    assert!(read_all(&mut served.connect()).unwrap().iter().all(|byte| *byte == 3));
    assert!(began.elapsed() < PATIENCE);
    std::thread::sleep(Duration::from_millis(1500));
    let mut taken = 0;
    lazy.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = vec![0; 1 << 20];
    while let Ok(bytes) = lazy.read(&mut buffer) {
        if bytes == 0 {
            break;
        }
        taken += bytes;
    }
    assert!(taken < 32 << 20, "a reply went through to a client that did not read: {taken}");
    served.stop();
}

#[test]
fn a_client_that_never_says_what_it_wants_is_hung_up_on() {
    let folder = tempfile::tempdir().unwrap();
    let options = ServerOptions { client_timeout: Duration::from_millis(300), ..ServerOptions::default() };
    let served = Served::one(RawFile::open(&raw_image(folder.path(), MIB)), options);
    let silent = UnixStream::connect(served.server.socket()).unwrap();
    let mut dripping = UnixStream::connect(served.server.socket()).unwrap();
    let began = Instant::now();
    while dripping.write_all(&[0]).is_ok() {
        assert!(began.elapsed() < PATIENCE, "a client may take for ever, byte by byte");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(hung_up(silent, PATIENCE));
    served.stop();
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::one(RawFile::open(&raw_image(folder.path(), MIB)), ServerOptions::default());
    let mut client = served.connect();
    let mut babbler = UnixStream::connect(served.server.socket()).unwrap();
    babbler.write_all(&[0xff; 4096]).unwrap();
    assert!(hung_up(babbler, PATIENCE));
    let (Plain(mut babbler), _) = Plain::open(&served);
    babbler.write_all(&[0x25, 0x60, 0x95, 0x14]).unwrap();
    assert!(hung_up(babbler, PATIENCE));
    read_all(&mut client).unwrap();
    read_all(&mut served.connect()).unwrap();
    served.stop();
}

#[test]
fn connections_above_the_limit_are_closed_and_places_become_free_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let served = Served::one(RawFile::open(&raw_image(folder.path(), MIB)), options);
    let (first, second) = (served.connect(), served.connect());
    assert!(matches!(served.try_connect(), Err(NbdClientError::Closed)));
    drop(first);
    let began = Instant::now();
    while served.try_connect().is_err() {
        assert!(began.elapsed() < PATIENCE, "the place does not become free");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(second);
    served.stop();
}

#[test]
fn stopping_hangs_up_ends_all_threads_and_removes_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let source = RawFile::open(&raw_image(folder.path(), MIB));
    let served = Served::one(Arc::clone(&source) as Arc<dyn BlockSource>, ServerOptions::default());
    let mut clients: Vec<_> = (0..5).map(|_| served.connect()).collect();
    let socket = served.server.socket().to_owned();
    let began = Instant::now();
    served.server.stop(PATIENCE).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(!socket.exists());
    for client in &mut clients {
        assert!(matches!(read_all(client), Err(NbdClientError::Closed)));
    }
    // The accepting thread holds the disks until it ends, which it does by itself.
    while Arc::strong_count(&source) > 1 {
        assert!(began.elapsed() < PATIENCE, "a thread still holds the disk");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn stopping_does_not_wait_for_ever_for_a_disk_that_hangs() {
    let release = Arc::new(AtomicBool::new(false));
    let (released, (reading, begun)) = (Arc::clone(&release), std::sync::mpsc::channel());
    let reading = Mutex::new(reading);
    let source = Staged(MIB, move |_, _: &mut [u8]| {
        reading.lock().unwrap().send(()).unwrap();
        while !released.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    });
    let served = Served::one(Arc::new(source), ServerOptions::default());
    let mut client = served.connect();
    let reader = std::thread::spawn(move || read_all(&mut client));
    begun.recv_timeout(PATIENCE).unwrap();
    let began = Instant::now();
    let stuck = served.server.stop(Duration::from_millis(300)).unwrap_err();
    assert_eq!(stuck.0, 1);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(reader.join().unwrap().is_err());
    release.store(true, Ordering::Relaxed);
}

#[test]
fn the_socket_is_private() {
    let folder = tempfile::tempdir().unwrap();
    let source = RawFile::open(&raw_image(folder.path(), MIB));
    let served = Served::one(Arc::clone(&source) as Arc<dyn BlockSource>, ServerOptions::default());
    assert_eq!(std::fs::metadata(served.server.socket()).unwrap().mode() & 0o7777, 0o600);
    served.stop();

    let open = folder.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o750)).unwrap();
    let socket = open.join("nbd.sock");
    let exports = || vec![("disk".to_owned(), Arc::clone(&source) as Arc<dyn BlockSource>)];
    let refused = NbdServer::start(&socket, exports(), ServerOptions::default()).unwrap_err();
    assert!(matches!(refused, NbdServerError::FolderNotPrivate(_)), "{refused}");
    assert!(!socket.exists());

    let twice = [exports(), exports()].into_iter().flatten().collect();
    let private = private_folder();
    let refused = NbdServer::start(&private.path().join("nbd.sock"), twice, ServerOptions::default());
    assert!(matches!(refused, Err(NbdServerError::Export(name)) if name == "disk"));
}

#[test]
fn an_unprivileged_client_comes_in_when_the_socket_is_its_own_and_only_then() {
    if !rustix::process::geteuid().is_root() {
        // The test program captures `eprintln`, and shows nothing of a test that ends well.
        writeln!(io::stderr(), "skipped: giving a socket to another user takes root").expect("it is open");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), MIB);
    let nobody = 65_534;
    let as_nobody = |uri: &str| {
        run_anyhow("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups", "nbdinfo", "--size", uri])
    };
    for (client_uid, let_in) in [(Some(nobody), true), (None, false)] {
        let private = private_folder();
        let socket = private.path().join("nbd.sock");
        let exports = vec![("disk".to_owned(), RawFile::open(&image) as Arc<dyn BlockSource>)];
        let options = ServerOptions { client_uid, ..ServerOptions::default() };
        let server = NbdServer::start(&socket, exports, options).unwrap();
        std::os::unix::fs::chown(private.path(), Some(nobody), None).unwrap();
        if client_uid.is_none() {
            // Even a socket that somebody made reachable lets only known users in.
            std::os::unix::fs::chown(&socket, Some(nobody), None).unwrap();
        }
        assert_eq!(as_nobody(&uri(&socket, "disk")).status.success(), let_in, "{client_uid:?}");
        server.stop(PATIENCE).unwrap();
    }
}
