//! The load in a guest: numbered commits and numbered writes, each acknowledged to the host as it happens.
//!
//! `load --acks PORT [--commits DATABASE] [--writes LETTER=FILE]… [--pause-us N]`
//! `load --stalls FILE [--commits DATABASE] [--syncs LETTER=FILE]… [--dirty MIB_PER_S=FILE] [--pause-us N]`
//!
//! * `--commits`: one client of PostgreSQL that inserts rows 1, 2, 3 … into table `commits`, each a transaction of its own,
//!   and sends `c N` only after the server has acknowledged the commit of row N.
//! * `--writes`: appends records of 16 bytes to a file without ever calling fsync, and sends `LETTER N` after the `write()`
//!   of record N returned.
//!
//! Both go on where an earlier run ended. `load --count FILE` prints how many records FILE holds from its start without a gap.
//!
//! With `--stalls` nothing is acknowledged; FILE gets a line for each commit (`c`) and each block that `--syncs` wrote and
//! synced, with the time that it took. `--dirty` overwrites pages of another file at random without syncing them (`d`: bytes
//! in a second).
//!
//! One program for all, as the kernel lets one process open a virtio port at a time.

mod stalls;

use stalls::Log;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One record: the number in 15 digits and a newline.
const RECORD_BYTES: usize = 16;
/// Between two commits or writes: a few hundred each second keep an emulated processor free for the rest.
const PAUSE_US_DEFAULT: u64 = 3_000;
/// Debian's cluster `main`.
const SOCKET: &str = "/run/postgresql/.s.PGSQL.5432";

type Port = Arc<Mutex<File>>;

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

type Work = Box<dyn FnOnce() -> Result<(), String> + Send>;

fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), String> {
    let (mut acks, mut stalls, mut commits, mut dirty) = (None, None, None, None);
    let (mut writes, mut syncs, mut pause_us) = (Vec::new(), Vec::new(), PAUSE_US_DEFAULT);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--acks" => acks = Some(value),
            "--stalls" => stalls = Some(value),
            "--commits" => commits = Some(value),
            "--writes" => writes.push(lettered(&argument, &value)?),
            "--syncs" => syncs.push(lettered(&argument, &value)?),
            "--dirty" => {
                let parts = value.split_once('=').and_then(|(rate, file)| Some((rate.parse().ok()?, file)));
                let (rate, file): (u64, &str) =
                    parts.ok_or_else(|| format!("--dirty MIB_PER_S=FILE, not {value}"))?;
                dirty = Some((rate, file.to_owned()));
            }
            "--pause-us" => pause_us = value.parse().map_err(|_| format!("--pause-us N, not {value}"))?,
            "--count" => {
                println!("{}", count(&value).map_err(|error| format!("{value}: {error}"))?);
                return Ok(());
            }
            _ => return Err(format!("unknown argument {argument}")),
        }
    }
    let pause = Duration::from_micros(pause_us);
    let mut works: Vec<Work> = Vec::new();
    match (acks, stalls) {
        (Some(acks), None) => {
            let port =
                OpenOptions::new().write(true).open(&acks).map_err(|error| format!("{acks}: {error}"))?;
            let port: Port = Arc::new(Mutex::new(port));
            for (letter, file) in writes {
                let port = Arc::clone(&port);
                works.push(Box::new(move || {
                    write_records(&file, &letter, &port, pause).map_err(|error| format!("{file}: {error}"))
                }));
            }
            if let Some(database) = commits {
                let tell = move |number, _began| acknowledge(&port, "c", number);
                works.push(Box::new(move || commit_rows(&database, tell, pause)));
            }
        }
        (None, Some(stalls)) => {
            let log = Log::create(&stalls).map_err(|error| format!("{stalls}: {error}"))?;
            for (letter, file) in syncs {
                let log = log.clone();
                works.push(Box::new(move || {
                    stalls::sync_blocks(&file, &letter, &log, pause)
                        .map_err(|error| format!("{file}: {error}"))
                }));
            }
            if let Some((rate, file)) = dirty {
                let log = log.clone();
                works.push(Box::new(move || {
                    stalls::dirty_pages(&file, "d", &log, rate).map_err(|error| format!("{file}: {error}"))
                }));
            }
            if let Some(database) = commits {
                let tell = move |_number, began| log.note("c", began);
                works.push(Box::new(move || commit_rows(&database, tell, pause)));
            }
        }
        _ => return Err("--acks PORT or --stalls FILE is needed".to_owned()),
    }
    // Each runs until it fails; the first to be joined that did ends the program.
    let threads: Vec<_> = works.into_iter().map(std::thread::spawn).collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread of the load panicked".to_owned())??;
    }
    Ok(())
}

fn lettered(argument: &str, value: &str) -> Result<(String, String), String> {
    match value.split_once('=') {
        Some((letter, file)) if letter.len() == 1 => Ok((letter.to_owned(), file.to_owned())),
        _ => Err(format!("{argument} LETTER=FILE, not {value}")),
    }
}

/// One write for one line: the kernel does not mix two, and the host reads whole lines.
fn acknowledge(port: &Port, letter: &str, number: u64) -> io::Result<()> {
    port.lock().unwrap_or_else(PoisonError::into_inner).write_all(format!("{letter} {number}\n").as_bytes())
}

/// `tell` gets each row's number and the time at which its insert was sent, once its commit was acknowledged.
fn commit_rows(
    database: &str,
    tell: impl Fn(u64, Instant) -> io::Result<()>,
    pause: Duration,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let socket =
            tokio::net::UnixStream::connect(SOCKET).await.map_err(|error| format!("{SOCKET}: {error}"))?;
        let mut config = tokio_postgres::Config::new();
        config.user("postgres").dbname(database);
        let (client, connection) =
            config.connect_raw(socket, tokio_postgres::NoTls).await.map_err(postgresql)?;
        // Ends with the client; what went wrong on the way shows at the client's next statement.
        let _carrier = tokio::spawn(connection);
        let row = client
            .query_one("select coalesce(max(number), 0) from commits", &[])
            .await
            .map_err(postgresql)?;
        let insert = client.prepare("insert into commits (number) values ($1)").await.map_err(postgresql)?;
        let first = row.get::<_, i64>(0) + 1;
        for number in first.. {
            let began = Instant::now();
            // Outside a transaction block, the answer to an insert is the answer to its commit.
            client.execute(&insert, &[&number]).await.map_err(postgresql)?;
            tell(number.unsigned_abs(), began).map_err(|error| format!("commits: {error}"))?;
            tokio::time::sleep(pause).await;
        }
        Ok(())
    })
}

fn postgresql(error: tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(said) => format!("PostgreSQL: {said}"),
        None => format!("PostgreSQL: {error}"),
    }
}

fn write_records(path: &str, letter: &str, port: &Port, pause: Duration) -> io::Result<()> {
    let done = match count(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        counted => counted?,
    };
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    for number in done + 1.. {
        file.write_all(&record(number))?;
        acknowledge(port, letter, number)?;
        std::thread::sleep(pause);
    }
    Ok(())
}

fn record(number: u64) -> [u8; RECORD_BYTES] {
    let mut record = [b'\n'; RECORD_BYTES];
    // Fifteen digits last for longer than any machine.
    record[..RECORD_BYTES - 1].copy_from_slice(format!("{number:015}").as_bytes());
    record
}

/// How many records a file holds from its start, until the first that is missing or damaged.
fn count(path: &str) -> io::Result<u64> {
    let mut file = io::BufReader::new(File::open(path)?);
    let mut found = [0; RECORD_BYTES];
    for number in 1.. {
        match file.read_exact(&mut found) {
            Ok(()) if found == record(number) => {}
            Ok(()) => return Ok(number - 1),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(number - 1),
            Err(error) => return Err(error),
        }
    }
    Ok(0)
}
