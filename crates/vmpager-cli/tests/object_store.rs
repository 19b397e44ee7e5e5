//! Images in object stores: an S3 server process (`s3s-fs`) where there is one, with what
//! goes wrong on the way to it; and what GCS and Azure are asked, by a server that does
//! what it is told to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod images;

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use images::{Dir, free_port, remote, stderr, verified, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use vmpager_testing::http::{Fault, Server};
use vmpager_testing::proxy::{Proxy, Trouble};
use vmpager_testing::secure::Authority;

const KEY: &str = "images/mem of a guest.vmimg";

/// An S3 server with a bucket, in which an image is.
struct S3 {
    process: Child,
    port: u16,
    dir: Dir,
}

impl S3 {
    /// Starts it, if this machine has it; says so if not.
    fn start() -> Option<Self> {
        let (mut dir, port) = (Dir::new(), free_port());
        fs::create_dir_all(dir.path("store/bucket/images")).unwrap();
        fs::copy(dir.path("image"), dir.path("store/bucket").join(KEY)).unwrap();
        let started = Command::new("s3s-fs")
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .args(["--access-key", "somebody", "--secret-key", "whose key this is"])
            .arg(dir.path("store"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let process = match started {
            Ok(process) => process,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                vmpager_testing::skipped("no s3s-fs (cargo install s3s-fs --features binary)");
                return None;
            }
            Err(error) => panic!("s3s-fs: {error}"),
        };
        dir.env = vec![
            ("AWS_ACCESS_KEY_ID", "somebody".into()),
            ("AWS_SECRET_ACCESS_KEY", "whose key this is".into()),
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
            ("AWS_ALLOW_HTTP", "true".into()),
        ];
        let s3 = Self { process, port, dir };
        wait_for("s3s-fs", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        Some(s3)
    }

    fn url(&self) -> String {
        format!("s3://bucket/{KEY}")
    }

    fn set(&mut self, name: &'static str, value: &str) {
        set(&mut self.dir, name, value);
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn set(dir: &mut Dir, name: &'static str, value: &str) {
    dir.env.retain(|(other, _)| *other != name);
    dir.env.push((name, value.to_owned()));
}

fn unpacked(dir: &Dir, args: &[&str]) {
    dir.done(&[&["image", "unpack", "--force"], args, &["out"]].concat());
    assert!(fs::read(dir.path("out")).unwrap() == fs::read(dir.mem()).unwrap());
}

/// What is said of an image that cannot be opened.
fn refusal(dir: &Dir, url: &str) -> String {
    let output = dir.run(&["image", "inspect", url]);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(url), "{said}");
    said
}

#[test]
fn every_byte_comes_whatever_goes_wrong_on_the_way() {
    let Some(mut s3) = S3::start() else { return };
    let url = s3.url();
    s3.dir.done(&["image", "verify", &url]);
    unpacked(&s3.dir, &[&url]);

    let proxy = Proxy::before(s3.port);
    s3.set("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", proxy.port()));
    proxy.latency(Duration::from_millis(20));
    unpacked(&s3.dir, &[&url]);
    proxy.latency(Duration::ZERO);
    for trouble in [Trouble::Cut, Trouble::Reset] {
        // More than opening it takes, and each time somewhere else.
        let before = proxy.connections();
        proxy.script(move |number| {
            let at = usize::try_from(number % 13).unwrap() * 60_000;
            (number.is_multiple_of(2)).then_some(trouble(700_000 + at))
        });
        unpacked(&s3.dir, &[&url]);
        assert!(proxy.connections() > before + 2, "nothing went wrong");
    }
}

#[test]
fn layers_look_for_what_is_below_in_their_bucket() {
    let Some(s3) = S3::start() else { return };
    let dir = &s3.dir;
    let base = s3.url();
    let mut memory = fs::read(dir.mem()).unwrap();
    for page in (0..memory.len()).step_by(7 * 4096) {
        memory[page + 5] ^= 0x55;
    }
    fs::write(dir.path("later"), &memory).unwrap();
    // Made over the one in the store, and put beside it.
    dir.done(&["image", "diff", &base, "later", "store/bucket/images/layer"]);
    dir.done(&["image", "unpack", "s3://bucket/images/layer", "out"]);
    assert!(fs::read(dir.path("out")).unwrap() == memory);
}

#[test]
fn a_confined_daemon_that_is_restarted_fetches_nothing_that_is_in_its_cache() {
    let Some(s3) = S3::start() else { return };
    let cache = ["--cache", "cache", "--cache-size", "1G"];
    let first = s3.dir.session(&s3.url(), &cache);
    let count = |numbers: &serde_json::Value, what: &str| numbers[what].as_u64().unwrap();
    assert!(count(&first, "frames_fetched") > 50, "{first}");
    let second = s3.dir.session(&s3.url(), &cache);
    assert!(count(&second, "frames_cached") > 50, "{second}");
    // The daemon may have ended before the last of it was written.
    let not_kept = count(&first, "frames_fetched") - count(&first, "frames_stored");
    assert!(count(&second, "frames_fetched") <= not_kept, "{first}, then {second}");
}

#[test]
fn another_object_in_its_place_is_no_page_of_it() {
    let Some(s3) = S3::start() else { return };
    let dir = &s3.dir;
    let pager = dir.serve(&s3.url(), &["--prefetch", "off"]);
    fs::write(dir.path("new"), vec![7; 1 << 20]).unwrap();
    fs::rename(dir.path("new"), dir.path("store/bucket").join(KEY)).unwrap();
    let output = dir.guest("2000").wait_with_output().unwrap();
    assert!(!output.status.success(), "a guest without its memory went on");
    kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
    let log = stderr(&pager.wait_with_output().unwrap());
    assert!(log.contains("modified while being served"), "{log}");
}

#[test]
fn the_same_object_put_there_anew_is_gone_on_with() {
    let Some(s3) = S3::start() else { return };
    let (dir, object) = (&s3.dir, s3.dir.path("store/bucket").join(KEY));
    let pager = dir.serve(&s3.url(), &["--prefetch", "off"]);
    fs::copy(&object, dir.path("again")).unwrap();
    fs::rename(dir.path("again"), &object).unwrap();
    verified(dir.guest("1000"), "1000");
    kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
    assert!(remote(pager)["frames_fetched"].as_u64().unwrap() > 0);
}

#[test]
fn what_cannot_be_had_says_why_and_what_to_do() {
    let Some(mut s3) = S3::start() else { return };
    let url = s3.url();
    let says = |s3: &S3, url: &str, all: &[&str]| {
        let said = refusal(&s3.dir, url);
        assert!(all.iter().all(|part| said.contains(part)), "{all:?}: {said}");
        assert!(!said.contains("whose key"), "{said}");
    };
    says(&s3, "s3://bucket/images/none", &["no such object (404)", "URL is right"]);
    // This server does not tell a bucket that there is not from an object.
    says(&s3, "s3://buckets/image", &["no such object (404)", "URL is right"]);
    says(&s3, "s3://bucket/a//b", &["empty parts"]);
    says(&s3, "s3://bucket", &["a bucket and a key"]);
    s3.set("AWS_SECRET_ACCESS_KEY", "of somebody else");
    says(&s3, &url, &["refuses access (403 SignatureDoesNotMatch)", "AWS_SECRET_ACCESS_KEY"]);
    s3.set("AWS_ACCESS_KEY_ID", "nobody");
    says(&s3, &url, &["refuses access (403", "AWS_ACCESS_KEY_ID"]);
    s3.set("AWS_ALLOW_HTTP", "false");
    says(&s3, &url, &["others can listen", "AWS_ALLOW_HTTP=true"]);
    s3.set("AWS_ALLOW_HTTP", "true");
    let nobody = format!("http://127.0.0.1:{}", free_port());
    s3.set("AWS_ENDPOINT_URL", &nobody);
    says(&s3, &url, &["see whether the server runs"]);
    // Somebody without keys, where no role is given either.
    s3.dir.env.retain(|(name, _)| !name.contains("KEY"));
    s3.set("AWS_METADATA_ENDPOINT", &nobody);
    says(&s3, &url, &["no credentials", "AWS_ACCESS_KEY_ID"]);
    s3.set("AWS_ACCESS_KEY_ID", "half of it");
    says(&s3, &url, &["no credentials", "AWS_SECRET_ACCESS_KEY"]);
}

/// The image at a server, under this path.
fn put(server: &Server, dir: &Dir, path: &str) {
    server.put(path, fs::read(dir.path("image")).unwrap(), Some("\"1\""));
}

#[test]
fn google_and_azure_are_asked_as_they_want_to_be() {
    let (mut dir, authority) = (Dir::new(), Authority::new());
    fs::write(dir.path("ca"), authority.pem()).unwrap();
    let server = Server::secure(&authority.vouch_for("127.0.0.1"));
    // One encodes what separates the parts of a key.
    let paths = ["/bucket/images%2Fmem", "/bucket/images/mem"];
    paths.iter().for_each(|path| put(&server, &dir, path.trim_start_matches('/')));
    let base = server.url("");
    let base = base.trim_end_matches('/');
    set(&mut dir, "GOOGLE_BASE_URL", base);
    set(&mut dir, "GOOGLE_BEARER_TOKEN", "a token");
    set(&mut dir, "AZURE_STORAGE_ENDPOINT", base);
    set(&mut dir, "AZURE_STORAGE_ACCOUNT_NAME", "account");
    set(&mut dir, "AZURE_STORAGE_ACCOUNT_KEY", "YSBrZXk=");
    for (url, path, authorized) in [
        ("gs://bucket/images/mem", paths[0], "Bearer a token"),
        ("az://bucket/images/mem", paths[1], "SharedKey account:"),
    ] {
        let before = server.requests().len();
        unpacked(&dir, &[url, "--ca-file", "ca"]);
        let asked = server.requests().split_off(before);
        assert!(asked.len() > 2, "{asked:?}");
        for request in &asked {
            assert_eq!(request.path, path);
            assert!(request.headers["authorization"].starts_with(authorized), "{request:?}");
        }
        // What is not opened yet is asked for as it is known to be.
        let condition = asked.last().unwrap().headers.get("if-match");
        assert_eq!(condition.map(String::as_str), Some("\"1\""));
        let before = server.requests().len() as u64;
        server.script(move |request| match request.number - before.min(request.number) {
            3 => Some(Fault::Reset(5000)),
            4 => Some(Fault::Status(503, Some(("Retry-After", "0".into())))),
            _ => None,
        });
        unpacked(&dir, &[url, "--ca-file", "ca"]);
        for (fault, says) in [
            (
                Fault::Status(403, Some(("x-ms-error-code", "AuthenticationFailed".into()))),
                "AuthenticationFailed",
            ),
            (
                Fault::Status(404, Some(("x-ms-error-code", "ContainerNotFound".into()))),
                "no such bucket",
            ),
            (Fault::IgnoreRange, "ignores ranges"),
        ] {
            server.script(move |_| Some(fault.clone()));
            let output = dir.run(&["image", "inspect", url, "--ca-file", "ca"]);
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains(says) && said.contains(url), "{said}");
        }
        server.script(|_| None);
    }
}
