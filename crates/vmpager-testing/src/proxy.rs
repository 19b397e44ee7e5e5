//! What stands between a client and a server, and does wrong what it is told to.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What goes wrong with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It ends after so many bytes from the server, as if that were all.
    Cut(usize),
    /// It is reset after so many.
    Reset(usize),
}

type Script = Box<dyn Fn(u64) -> Option<Trouble> + Send + Sync>;

struct Shared {
    server: SocketAddr,
    script: Mutex<Script>,
    latency: Mutex<Duration>,
    connections: AtomicU64,
    closed: AtomicBool,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy({} to {})", self.address, self.shared.server)
    }
}

/// The proxy. It takes no more connections once it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepts: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Stands before a server on loopback.
    ///
    /// # Panics
    ///
    /// If there is no port to be had.
    pub fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared {
            server: (Ipv4Addr::LOCALHOST, port).into(),
            script: Mutex::new(Box::new(|_| None)),
            latency: Mutex::default(),
            connections: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        let accepts = std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.closed.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&accepting);
                // Either side notices that a connection has failed.
                std::thread::spawn(move || shared.relay(&client).ok());
            }
        });
        Self { address, shared, accepts: Some(accepts) }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Says what goes wrong with each connection from now on, by its number.
    pub fn script(&self, script: impl Fn(u64) -> Option<Trouble> + Send + Sync + 'static) {
        *self.shared.script.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(script);
    }

    /// Holds back what clients send, for so long, from now on.
    pub fn latency(&self, latency: Duration) {
        *self.shared.latency.lock().unwrap_or_else(PoisonError::into_inner) = latency;
    }

    /// How many connections there were.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        let _ = self.accepts.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn relay(&self, client: &TcpStream) -> std::io::Result<()> {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let trouble = (self.script.lock().unwrap_or_else(PoisonError::into_inner))(number);
        let server = TcpStream::connect(self.server)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        std::thread::scope(|scope| {
            let requests = scope.spawn(|| self.requests(client, &server));
            let ended = answers(&server, client, trouble);
            if let Some(Trouble::Reset(_)) = trouble {
                // Then the kernel resets what it closes.
                let _ = rustix::net::sockopt::set_socket_linger(client, Some(Duration::ZERO));
                let _ = client.shutdown(Shutdown::Read);
            } else {
                let _ = client.shutdown(Shutdown::Both);
            }
            let _ = server.shutdown(Shutdown::Both);
            let _ = requests.join();
            ended
        })
    }

    fn requests(&self, mut client: &TcpStream, mut server: &TcpStream) -> std::io::Result<()> {
        let mut bytes = vec![0; 16 << 10];
        loop {
            let count = client.read(&mut bytes)?;
            if count == 0 {
                return server.shutdown(Shutdown::Write);
            }
            let latency = *self.latency.lock().unwrap_or_else(PoisonError::into_inner);
            std::thread::sleep(latency);
            server.write_all(&bytes[..count])?;
        }
    }
}

/// Hands on what the server sends, until there is trouble.
fn answers(
    mut server: &TcpStream,
    mut client: &TcpStream,
    trouble: Option<Trouble>,
) -> std::io::Result<()> {
    let mut left = trouble.map(|(Trouble::Cut(bytes) | Trouble::Reset(bytes))| bytes);
    let mut bytes = vec![0; 16 << 10];
    loop {
        let room = left.map_or(bytes.len(), |left| left.min(bytes.len()));
        if room == 0 {
            return Ok(());
        }
        let count = server.read(&mut bytes[..room])?;
        if count == 0 {
            return Ok(());
        }
        client.write_all(&bytes[..count])?;
        left = left.map(|left| left - count);
    }
}
