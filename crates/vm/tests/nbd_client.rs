//! Our NBD client against QEMU's server.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod nbd_peers;

use nbd::{BASE_ALLOCATION, HandshakeError, allocation, bitmap, dirty_bitmap_context};
use nbd_peers::{PATIENCE, QemuNbd, raw_image, run};
use std::io::{Read, Write};
use std::iter::once;
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm::nbd_client::{Chunk, NbdClient, NbdClientError, ReadOptions};

const MIB: u64 = 1 << 20;

fn connect(server: &QemuNbd, contexts: &[&str]) -> NbdClient {
    NbdClient::connect(&server.socket, "disk", contexts, PATIENCE).unwrap()
}

/// (offset, length, flags) as `nbdinfo --map` tells them, neighbours of the same flags joined.
fn map_by_nbdinfo(server: &QemuNbd, context: &str) -> Vec<(u64, u64, u32)> {
    let printed = run("nbdinfo", &[&format!("--map={context}"), &server.uri()]);
    let mut extents: Vec<(u64, u64, u32)> = Vec::new();
    for line in printed.lines() {
        let mut words = line.split_whitespace();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        let (offset, length, flags) = (number(), number(), u32::try_from(number()).unwrap());
        match extents.last_mut() {
            Some(last) if last.2 == flags => last.1 += length,
            _ => extents.push((offset, length, flags)),
        }
    }
    extents
}

fn map_by_us(server: &QemuNbd, context: &str) -> Vec<(u64, u64, u32)> {
    let mut client = connect(server, &[context]);
    let size = client.size_bytes();
    let extents = client.extents(context, 0..size).unwrap();
    extents.iter().map(|extent| (extent.offset, extent.length, extent.flags)).collect()
}

/// Reads ranges into one buffer of the disk's size; every byte of them must come exactly once.
fn read(client: &mut NbdClient, ranges: &[Range<u64>], options: ReadOptions<'_>) -> (Vec<u8>, u64) {
    let size = usize::try_from(client.size_bytes()).unwrap();
    let (mut disk, mut seen, mut holes) = (vec![0; size], vec![0u8; size], 0);
    let step = u64::from(options.request_bytes);
    client
        .read_pipelined::<NbdClientError>(ranges.iter().cloned(), options, |offset, chunk| {
            let length = match chunk {
                Chunk::Data(bytes) => {
                    let start = usize::try_from(offset).unwrap();
                    disk[start..start + bytes.len()].copy_from_slice(bytes);
                    bytes.len() as u64
                }
                Chunk::Hole(length) => {
                    holes += length;
                    length
                }
            };
            assert_eq!(offset / step, (offset + length - 1) / step, "a chunk crosses a boundary");
            for count in
                &mut seen[usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap()]
            {
                *count += 1;
            }
            Ok(())
        })
        .unwrap();
    let wanted = |at: usize| ranges.iter().any(|range| range.contains(&(at as u64)));
    assert!((0..size).step_by(512).all(|at| seen[at] == u8::from(wanted(at))), "missing or twice");
    assert!(seen.iter().all(|count| *count <= 1));
    (disk, holes)
}

#[test]
fn a_raw_disk_is_read_byte_for_byte_without_its_holes() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 48 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let mut client = connect(&server, &[BASE_ALLOCATION]);
    assert_eq!(client.size_bytes(), 48 * MIB);
    let (disk, holes) = read(&mut client, &[0..MIB / 3, MIB / 3..48 * MIB], ReadOptions::default());
    assert!(disk == std::fs::read(&image).unwrap(), "the bytes differ");
    let mapped = client.extents(BASE_ALLOCATION, 0..48 * MIB).unwrap();
    let zeroes = mapped.iter().filter(|extent| extent.flags & allocation::ZERO != 0);
    assert_eq!(holes, zeroes.map(|extent| extent.length).sum::<u64>());
    assert!(holes > MIB);
}

#[test]
fn scattered_ranges_are_read_in_small_requests_too() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 24 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let ranges: Vec<_> = (0..24 * MIB).step_by(36_864).map(|at| at..(at + 8192).min(24 * MIB)).collect();
    let content = std::fs::read(&image).unwrap();
    for (in_flight, request_bytes) in [(1, 4096), (8, 4096), (64, 65_536), (3, 1 << 20)] {
        let mut client = connect(&server, &[]);
        let options = ReadOptions { in_flight, request_bytes, cancel: None };
        let (disk, _) = read(&mut client, &ranges, options);
        for range in &ranges {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            assert!(disk[range.clone()] == content[range]);
        }
    }
}

#[test]
fn allocation_of_a_raw_disk_is_what_nbdinfo_and_qemu_img_say() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 48 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let ours = map_by_us(&server, BASE_ALLOCATION);
    assert_eq!(ours, map_by_nbdinfo(&server, BASE_ALLOCATION));
    let printed = run("qemu-img", &["map", "--output=json", "-f", "raw", image.to_str().unwrap()]);
    let map: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let theirs: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|part| (part["start"].as_u64().unwrap(), part["length"].as_u64().unwrap(), part["zero"] == true))
        .collect();
    let ours: Vec<_> =
        ours.iter().map(|&(offset, length, flags)| (offset, length, flags & allocation::ZERO != 0)).collect();
    assert_eq!(ours, theirs);
    assert!(ours.len() > 10);
}

/// A qcow2 image with a persistent bitmap `b0`, and writes after the bitmap was made.
fn image_with_bitmap(folder: &Path) -> String {
    let image = folder.join("disk.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "3G"]);
    let write = |what: &str| run("qemu-io", &["-f", "qcow2", "-c", what, &image]);
    write("write -q -P 0x11 0 8M");
    run("qemu-img", &["bitmap", "-f", "qcow2", "--add", "-g", "4096", &image, "b0"]);
    for place in 0..40_u64 {
        write(&format!(
            "write -q -P {} {} {}k",
            place + 32,
            place * 77_000_704 / 4096 * 4096,
            4 + place % 3 * 4
        ));
    }
    write("write -q -P 0x77 1073737728 8192"); // across the end of one status request
    write("write -q -P 0x78 3221221376 4096"); // the disk's last block
    image
}

#[test]
fn a_dirty_bitmap_is_what_nbdinfo_says_and_its_blocks_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_with_bitmap(folder.path());
    let server = QemuNbd::serve(folder.path(), &["--format=qcow2", "--bitmap=b0", &image]);
    let context = dirty_bitmap_context("b0");
    let ours = map_by_us(&server, &context);
    assert_eq!(ours, map_by_nbdinfo(&server, &context));
    assert_eq!(ours.iter().map(|extent| extent.1).sum::<u64>(), 3 << 30);

    let dirty: Vec<_> = ours.iter().filter(|extent| extent.2 & bitmap::DIRTY != 0).collect();
    assert!(dirty.len() >= 40, "{dirty:?}");
    let mut client = connect(&server, &[&context, BASE_ALLOCATION]);
    let mut blocks = std::collections::BTreeMap::new();
    let ranges = dirty.iter().map(|extent| extent.0..extent.0 + extent.1);
    client
        .read_pipelined::<NbdClientError>(ranges, ReadOptions::default(), |offset, chunk| {
            let Chunk::Data(bytes) = chunk else { panic!("a written block came as a hole") };
            assert_eq!(bytes.len() % 4096, 0);
            for (place, block) in bytes.chunks(4096).enumerate() {
                assert!(block.iter().all(|byte| *byte == block[0]));
                blocks.insert(offset + place as u64 * 4096, block[0]);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(blocks.len() as u64 * 4096, dirty.iter().map(|extent| extent.1).sum::<u64>());
    assert_eq!((blocks[&1_073_737_728], blocks[&1_073_741_824], blocks[&3_221_221_376]), (0x77, 0x77, 0x78));
    assert_eq!(blocks[&(77_000_704 / 4096 * 4096)], 33);
}

#[test]
fn contexts_of_an_export_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let image = image_with_bitmap(folder.path());
    let server = QemuNbd::serve(folder.path(), &["--format=qcow2", "--bitmap=b0", &image]);
    let listed = NbdClient::list_contexts(&server.socket, "disk", PATIENCE).unwrap();
    assert_eq!(listed, ["base:allocation", "qemu:dirty-bitmap:b0"]);
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let failure = |export: &str, contexts: &[&str]| {
        NbdClient::connect(&server.socket, export, contexts, PATIENCE).unwrap_err()
    };
    let error = failure("nosuch", &[BASE_ALLOCATION]);
    assert!(
        matches!(&error, NbdClientError::Handshake(HandshakeError::UnknownExport { name, .. }) if name == "nosuch"),
        "{error}"
    );
    let error = failure("disk", &[BASE_ALLOCATION, &dirty_bitmap_context("b9")]);
    assert!(error.to_string().contains("has no context \"qemu:dirty-bitmap:b9\""), "{error}");
    let nobody = NbdClient::connect(&folder.path().join("nobody"), "disk", &[], PATIENCE).unwrap_err();
    assert!(matches!(nobody, NbdClientError::Connect { .. }), "{nobody}");
    let error = connect(&server, &[]).extents(BASE_ALLOCATION, 0..512).unwrap_err();
    assert!(matches!(error, NbdClientError::NoContext(_)), "{error}");
}

/// QEMU 7.2 answers some errors of its storage with an error, and some by hanging up.
#[test]
fn a_storage_error_is_an_error_and_the_connection_is_not_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 16 * MIB);
    let broken = format!(
        "driver=blkdebug,image.driver=file,image.filename={},inject-error.0.event=none,\
         inject-error.0.iotype=read,inject-error.0.errno=5,inject-error.0.sector=8192,inject-error.0.once=off",
        image.display()
    );
    let server = QemuNbd::serve(folder.path(), &["--image-opts", &broken]);
    let mut client = connect(&server, &[]);
    let read = |client: &mut NbdClient| {
        client.read_pipelined::<NbdClientError>(once(0..16 * MIB), ReadOptions::default(), |_, _| Ok(()))
    };
    let error = read(&mut client).unwrap_err();
    assert!(matches!(&error, NbdClientError::Refused { .. } | NbdClientError::Closed), "{error}");
    assert!(matches!(read(&mut client), Err(NbdClientError::Broken)));
}

#[test]
fn a_server_killed_in_the_middle_is_an_error_and_not_a_short_read() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 64 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let mut client = connect(&server, &[]);
    let mut chunks = 0;
    let error = client
        .read_pipelined::<NbdClientError>(once(0..64 * MIB), ReadOptions::default(), |_, _| {
            chunks += 1;
            if chunks == 4 {
                server.process.signal("KILL");
            }
            Ok(())
        })
        .unwrap_err();
    assert!(matches!(error, NbdClientError::Closed), "{error}");
    assert!(chunks >= 4);
}

#[test]
fn a_server_that_hangs_is_given_up_after_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 64 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let timeout = Duration::from_millis(700);
    let mut client = NbdClient::connect(&server.socket, "disk", &[], timeout).unwrap();
    let (mut chunks, mut stopped) = (0, Instant::now());
    let error = client
        .read_pipelined::<NbdClientError>(once(0..64 * MIB), ReadOptions::default(), |_, _| {
            chunks += 1;
            if chunks == 4 {
                server.process.signal("STOP");
                stopped = Instant::now();
            }
            Ok(())
        })
        .unwrap_err();
    assert!(matches!(error, NbdClientError::TimedOut(_)), "{error}");
    let waited = stopped.elapsed();
    assert!(waited >= timeout && waited < timeout + Duration::from_secs(5), "{waited:?}");

    let began = Instant::now();
    let error = NbdClient::connect(&server.socket, "disk", &[], timeout).unwrap_err();
    assert!(matches!(error, NbdClientError::TimedOut(_)), "{error}");
    assert!(began.elapsed() < timeout + Duration::from_secs(5));
}

/// A server that opens a disk of 1 MiB as it should, and then answers the first request byte by byte.
fn dripping_server(path: &Path) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let exports = [nbd::Export {
            name: "disk".to_owned(),
            size_bytes: MIB,
            flags: nbd::transmission_flags::HAS_FLAGS,
            contexts: Vec::new(),
            preferred_bytes: 4096,
        }];
        let (mut out, mut received) = (Vec::new(), Vec::new());
        let mut handshake = nbd::ServerHandshake::new(&mut out);
        loop {
            let decoded = handshake.decode(&received, &exports, &mut out).unwrap();
            stream.write_all(&std::mem::take(&mut out)).unwrap();
            match decoded {
                nbd::Decoded::More(wanted) => {
                    let before = received.len();
                    received.resize(wanted, 0);
                    stream.read_exact(&mut received[before..]).unwrap();
                }
                nbd::Decoded::Ready(_, nbd::ServerStep::Done(_)) => break,
                nbd::Decoded::Ready(consumed, _) => drop(received.drain(..consumed)),
            }
        }
        let reply = nbd::encode_data_header(1, 0, 512 << 10, true).unwrap();
        let bytes = reply.into_iter().chain(std::iter::repeat(7)).take(2000);
        for byte in bytes {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    })
}

#[test]
fn a_server_that_sends_byte_by_byte_is_given_up_after_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("drip.sock");
    let server = dripping_server(&path);
    let timeout = Duration::from_millis(600);
    let mut client = NbdClient::connect(&path, "disk", &[], timeout).unwrap();
    let began = Instant::now();
    let read = client.read_pipelined::<NbdClientError>(once(0..MIB), ReadOptions::default(), |_, _| Ok(()));
    assert!(matches!(read, Err(NbdClientError::TimedOut(_))), "{read:?}");
    assert!(began.elapsed() < timeout + Duration::from_secs(5), "{:?}", began.elapsed());
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_socket_whose_backlog_is_full_is_given_up_after_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let timeout = Duration::from_millis(50);
    // The kernel's own limit on the backlog is 4096 by default; nobody accepts.
    let waiting: Vec<_> = (0..5000)
        .map_while(|_| {
            let path = path.clone();
            let socket =
                rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None)
                    .unwrap();
            rustix::io::ioctl_fionbio(&socket, true).unwrap();
            let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
            rustix::net::connect(&socket, &address).ok().map(|()| socket)
        })
        .collect();
    assert!(waiting.len() < 5000, "the backlog does not fill");
    let error = NbdClient::connect(&path, "disk", &[], timeout).unwrap_err();
    assert!(matches!(error, NbdClientError::TimedOut(_)), "{error}");
}

#[test]
fn reading_ends_soon_after_it_is_cancelled_even_if_the_server_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 64 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let mut client = connect(&server, &[]);
    let cancel = AtomicBool::new(false);
    let mut began = Instant::now();
    std::thread::scope(|scope| {
        let options = ReadOptions { cancel: Some(&cancel), ..ReadOptions::default() };
        let mut chunks = 0;
        let error = client
            .read_pipelined::<NbdClientError>(once(0..64 * MIB), options, |_, _| {
                chunks += 1;
                if chunks == 4 {
                    server.process.signal("STOP");
                    began = Instant::now();
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_millis(300));
                        cancel.store(true, Ordering::Relaxed);
                    });
                }
                Ok(())
            })
            .unwrap_err();
        assert!(matches!(error, NbdClientError::Cancelled), "{error}");
    });
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn the_callers_own_error_ends_the_reading_and_comes_back() {
    #[derive(Debug)]
    struct Full(Option<NbdClientError>);
    impl From<NbdClientError> for Full {
        fn from(error: NbdClientError) -> Self {
            Self(Some(error))
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let image = raw_image(folder.path(), 8 * MIB);
    let server = QemuNbd::serve(folder.path(), &["--format=raw", image.to_str().unwrap()]);
    let mut client = connect(&server, &[]);
    let mut calls = 0;
    let result = client.read_pipelined(once(0..8 * MIB), ReadOptions::default(), |_, _| {
        calls += 1;
        Err(Full(None))
    });
    assert!(matches!(result, Err(Full(None))), "{result:?}");
    assert_eq!(calls, 1);
}
