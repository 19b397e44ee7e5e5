//! A server of one file, with a latency: what `bench restore` reads images at servers
//! from. Its threads are this process's; the page cache is the file's.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

/// Bytes sent at a time.
const PIECE: usize = 256 << 10;

/// The server, until it is dropped. Connections end with those who made them.
#[derive(Debug)]
pub(crate) struct FileServer {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    accepts: Option<JoinHandle<()>>,
}

impl FileServer {
    /// Serves parts of a file on loopback; each answer begins after the latency.
    pub(crate) fn start(path: &Path, latency: Duration) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let file = Arc::new((file.metadata()?.len(), file));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a port of loopback")?;
        let address = listener.local_addr()?;
        let closed = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&closed);
        let accepts = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if ends.load(Ordering::Relaxed) {
                    return;
                }
                let file = Arc::clone(&file);
                // Whoever asked notices that a connection has failed.
                std::thread::spawn(move || serve(&stream, &file.1, file.0, latency).ok());
            }
        });
        Ok(Self { address, closed, accepts: Some(accepts) })
    }

    /// Where the file is.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/image", self.address)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        if TcpStream::connect(self.address).is_ok() {
            let _ = self.accepts.take().map(JoinHandle::join);
        }
    }
}

/// Answers requests of one connection.
fn serve(mut stream: &TcpStream, file: &File, len: u64, latency: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut piece = vec![0; PIECE];
    loop {
        let (mut range, mut line) = (None, String::new());
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            let part = line.strip_prefix("range: bytes=").and_then(|part| part.split_once('-'));
            range = part
                .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)))
                .or(range);
        }
        std::thread::sleep(latency);
        let Some((first, last)) =
            range.filter(|(first, last): &(u64, u64)| first <= last && *last < len)
        else {
            stream.write_all(b"HTTP/1.1 416 No Such Part\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        let count = last - first + 1;
        let head = format!(
            "HTTP/1.1 206 Part\r\nContent-Length: {count}\r\n\
             Content-Range: bytes {first}-{last}/{len}\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        let mut at = first;
        while at <= last {
            let bytes = usize::try_from(last - at + 1).unwrap_or(PIECE).min(PIECE);
            file.read_exact_at(&mut piece[..bytes], at)?;
            stream.write_all(&piece[..bytes])?;
            at += bytes as u64;
        }
    }
}
