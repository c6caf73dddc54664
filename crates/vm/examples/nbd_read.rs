//! Reads a whole export and throws it away, to be measured beside `nbdcopy … null:`.
//!
//! `nbd_read SOCKET EXPORT [IN_FLIGHT [REQUEST_BYTES]]`

use std::path::Path;
use std::time::{Duration, Instant};
use vm::nbd_client::{Chunk, NbdClient, NbdClientError, ReadOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, rest @ ..] = &arguments[..] else {
        return Err("usage: nbd_read SOCKET EXPORT [IN_FLIGHT [REQUEST_BYTES]]".into());
    };
    let mut options = ReadOptions::default();
    if let Some(in_flight) = rest.first() {
        options.in_flight = in_flight.parse()?;
    }
    if let Some(request_bytes) = rest.get(1) {
        options.request_bytes = request_bytes.parse()?;
    }
    let began = Instant::now();
    let mut client = NbdClient::connect(Path::new(socket), export, &[], Duration::from_secs(30))?;
    let (mut data, mut holes) = (0, 0);
    let whole = std::iter::once(0..client.size_bytes());
    client.read_pipelined::<NbdClientError>(whole, options, |_, chunk| {
        match chunk {
            Chunk::Data(bytes) => data += bytes.len() as u64,
            Chunk::Hole(length) => holes += length,
        }
        Ok(())
    })?;
    println!("{data} bytes of data, {holes} of holes in {:?}", began.elapsed());
    Ok(())
}
