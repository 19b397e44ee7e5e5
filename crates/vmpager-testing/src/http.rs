//! A small HTTP server on loopback that serves parts of objects, and does wrong
//! what it is told to.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// How many came before it, since the server was started.
    pub number: u64,
    /// The path, with its query.
    pub path: String,
    /// The bytes that were asked for, all but the last.
    pub range: Option<Range<u64>>,
    /// All header lines, names in lower case.
    pub headers: HashMap<String, String>,
}

/// What goes wrong with an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another status, with a header or none.
    Status(u16, Option<(&'static str, String)>),
    /// All of the object, and 200.
    IgnoreRange,
    /// Another value of a header; or none, if it is empty.
    Header(&'static str, String),
    /// The body ends early, and then the connection does, as if that were all.
    Cut(usize),
    /// The connection is reset after so many bytes of the body.
    Reset(usize),
    /// The connection is closed instead of an answer.
    Close,
    /// No answer, for so long.
    Silence(Duration),
    /// Nothing more after so many bytes of the body, for so long.
    Stall(usize, Duration),
    /// A bit of this byte of the body is flipped.
    Flip(usize),
    /// Conditions are not looked at.
    Unconditional,
}

#[derive(Clone, Debug)]
struct Object {
    bytes: Arc<Vec<u8>>,
    tag: Option<String>,
}

type Script = Box<dyn Fn(&Request) -> Option<Fault> + Send + Sync>;

struct Shared {
    objects: Mutex<HashMap<String, Object>>,
    script: Mutex<Script>,
    latency: Mutex<Duration>,
    requests: Mutex<Vec<Request>>,
    closed: AtomicBool,
    #[cfg(feature = "tls")]
    tls: Option<Arc<rustls::ServerConfig>>,
}

/// What requests come and answers go over.
trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Server({})", self.address)
    }
}

/// The server. It ends when it is dropped, its connections with it.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    connections: Arc<Mutex<Vec<Weak<TcpStream>>>>,
    accepts: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// Starts one, at a port of the system's choice.
    ///
    /// # Panics
    ///
    /// If there is none to be had.
    pub fn new() -> Self {
        Self::at(0)
    }

    /// Starts one at this port.
    ///
    /// # Panics
    ///
    /// If somebody else has it.
    pub fn at(port: u16) -> Self {
        Self::start(port, Shared::default())
    }

    /// Starts one that speaks TLS, and shows this.
    ///
    /// # Panics
    ///
    /// If there is no port to be had.
    #[cfg(feature = "tls")]
    pub fn secure(identity: &crate::secure::Identity) -> Self {
        Self::start(0, Shared { tls: Some(identity.config()), ..Shared::default() })
    }

    fn start(port: u16, shared: Shared) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a port of loopback");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(shared);
        let connections = Arc::<Mutex<Vec<Weak<TcpStream>>>>::default();
        let (accepting, open) = (Arc::clone(&shared), Arc::clone(&connections));
        let accepts = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.closed.load(Ordering::Relaxed) {
                    return;
                }
                let stream = Arc::new(stream);
                lock(&open).push(Arc::downgrade(&stream));
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || shared.serve(&stream));
            }
        });
        Self { address, shared, connections, accepts: Some(accepts) }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The URL of an object.
    pub fn url(&self, name: &str) -> String {
        format!("{}://{}/{name}", self.shared.scheme(), self.address)
    }

    /// Serves an object, in the place of another one, perhaps.
    pub fn put(&self, name: &str, bytes: Vec<u8>, tag: Option<&str>) {
        let object = Object { bytes: Arc::new(bytes), tag: tag.map(str::to_owned) };
        lock(&self.shared.objects).insert(format!("/{name}"), object);
    }

    /// Says what goes wrong from now on.
    pub fn script(&self, script: impl Fn(&Request) -> Option<Fault> + Send + Sync + 'static) {
        *lock(&self.shared.script) = Box::new(script);
    }

    /// Waits so long before each answer from now on.
    pub fn latency(&self, latency: Duration) {
        *lock(&self.shared.latency) = latency;
    }

    /// What was asked for so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts, which then lets go of the port.
        let _ = TcpStream::connect(self.address);
        let _ = self.accepts.take().map(JoinHandle::join);
        for connection in lock(&self.connections).drain(..).filter_map(|open| open.upgrade()) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            objects: Mutex::default(),
            script: Mutex::new(Box::new(|_| None)),
            latency: Mutex::default(),
            requests: Mutex::default(),
            closed: AtomicBool::new(false),
            #[cfg(feature = "tls")]
            tls: None,
        }
    }
}

impl Shared {
    #[cfg(feature = "tls")]
    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    #[cfg(feature = "tls")]
    fn wire<'a>(&self, stream: &'a TcpStream) -> Option<Box<dyn Wire + 'a>> {
        let Some(config) = &self.tls else { return Some(Box::new(stream)) };
        let connection = rustls::ServerConnection::new(Arc::clone(config)).ok()?;
        Some(Box::new(rustls::StreamOwned::new(connection, stream)))
    }

    #[cfg(not(feature = "tls"))]
    fn scheme(&self) -> &'static str {
        "http"
    }

    #[cfg(not(feature = "tls"))]
    fn wire<'a>(&self, stream: &'a TcpStream) -> Option<Box<dyn Wire + 'a>> {
        Some(Box::new(stream))
    }

    fn serve(&self, stream: &TcpStream) {
        let _ = stream.set_nodelay(true);
        let Some(wire) = self.wire(stream) else { return };
        let mut reader = BufReader::new(wire);
        while let Some(request) = self.request(&mut reader) {
            let latency = *lock(&self.latency);
            std::thread::sleep(latency);
            let fault = (lock(&self.script))(&request);
            let wire = reader.get_mut();
            if self.closed.load(Ordering::Relaxed)
                || self.answer(wire, stream, &request, fault).is_none()
            {
                break;
            }
        }
    }

    fn request(&self, reader: &mut BufReader<Box<dyn Wire + '_>>) -> Option<Request> {
        let mut line = String::new();
        reader.by_ref().take(8192).read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
        let path = line.split(' ').nth(1)?.to_owned();
        let mut headers = HashMap::new();
        loop {
            line.clear();
            reader.by_ref().take(8192).read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let range = headers.get("range").and_then(|value| {
            let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
            Some(first.parse().ok()?..last.parse::<u64>().ok()? + 1)
        });
        let mut requests = lock(&self.requests);
        let number = requests.len() as u64;
        let request = Request { number, path, range, headers };
        requests.push(request.clone());
        Some(request)
    }

    /// Answers; `None` if the connection must end.
    fn answer(
        &self,
        wire: &mut dyn Wire,
        socket: &TcpStream,
        request: &Request,
        fault: Option<Fault>,
    ) -> Option<()> {
        let path = request.path.split('?').next().unwrap_or_default();
        let object = lock(&self.objects).get(path).cloned();
        let is_other = |object: &Object| {
            let wanted = request.headers.get("if-match");
            wanted.is_some() && wanted != object.tag.as_ref()
        };
        let (mut status, mut body, mut headers) = (206, &[][..], HashMap::new());
        match (&fault, &object) {
            (Some(Fault::Close), _) => return None,
            (Some(Fault::Silence(pause)), _) => {
                std::thread::sleep(*pause);
                return None;
            }
            (Some(Fault::Status(other, header)), _) => {
                status = *other;
                headers.extend(header.clone());
            }
            (_, None) => status = 404,
            (fault, Some(object)) if is_other(object) && *fault != Some(Fault::Unconditional) => {
                status = 412;
            }
            (_, Some(object)) => {
                headers.extend(object.tag.clone().map(|tag| ("ETag", tag)));
                let len = object.bytes.len();
                let whole = 0..len as u64;
                let asked = request.range.clone().unwrap_or(whole.clone());
                let asked = asked.start..asked.end.min(whole.end);
                if fault == Some(Fault::IgnoreRange) || request.range.is_none() {
                    (status, body) = (200, &object.bytes);
                } else if asked.is_empty() {
                    (status, headers) = (416, HashMap::new());
                } else {
                    let range = format!("bytes {}-{}/{len}", asked.start, asked.end - 1);
                    headers.insert("Content-Range", range);
                    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
                    body = &object.bytes[at(asked.start)..at(asked.end)];
                }
            }
        }
        headers.insert("Content-Length", body.len().to_string());
        send(wire, socket, status, headers, body, fault)
    }
}

/// Sends an answer, with what is wrong with its bytes.
fn send(
    wire: &mut dyn Wire,
    socket: &TcpStream,
    status: u16,
    mut headers: HashMap<&'static str, String>,
    body: &[u8],
    fault: Option<Fault>,
) -> Option<()> {
    if let Some(Fault::Header(name, value)) = &fault {
        headers.remove(name);
        headers.extend((!value.is_empty()).then(|| (*name, value.clone())));
    }
    let mut head = format!("HTTP/1.1 {status} As Told\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    wire.write_all((head + "\r\n").as_bytes()).ok()?;
    let part = |bytes: usize| &body[..bytes.min(body.len())];
    match fault {
        Some(Fault::Cut(bytes)) => {
            wire.write_all(part(bytes)).ok()?;
            return None;
        }
        Some(Fault::Reset(bytes)) => {
            wire.write_all(part(bytes)).ok()?;
            // What was sent shall arrive; then the kernel resets what it closes.
            std::thread::sleep(Duration::from_millis(2));
            let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
            return None;
        }
        Some(Fault::Stall(bytes, pause)) => {
            wire.write_all(part(bytes)).ok()?;
            std::thread::sleep(pause);
            return None;
        }
        Some(Fault::Flip(byte)) if !body.is_empty() => {
            let mut flipped = body.to_vec();
            flipped[byte % body.len()] ^= 0x10;
            wire.write_all(&flipped).ok()?;
        }
        _ => wire.write_all(body).ok()?,
    }
    Some(())
}
