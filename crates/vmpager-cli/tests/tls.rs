//! Images at `https://` servers: read over TLS, and from nobody else than whom the server
//! must be.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod images;

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};

use images::{Dir, Nginx, put, stderr};
use vmpager_testing::http::{Fault, Server};
use vmpager_testing::secure::Authority;

const HERE: &str = "127.0.0.1";

/// A directory with an image, an authority, and its certificate in the file `ca`.
fn world() -> (Dir, Authority) {
    let (dir, authority) = (Dir::new(), Authority::new());
    fs::write(dir.path("ca"), authority.pem()).unwrap();
    (dir, authority)
}

fn unpacked(dir: &Dir, args: &[&str]) {
    dir.done(&[&["image", "unpack", "--force"], args, &["out"]].concat());
    assert!(fs::read(dir.path("out")).unwrap() == fs::read(dir.mem()).unwrap());
}

/// What is said of a server, by the commands that open images.
fn refusal(dir: &Dir, url: &str, more: &[&str]) -> String {
    let mut said = String::new();
    for command in [
        &["image", "inspect", url][..],
        &["serve", "--socket", "sock", "--patience", "1", "--image", url],
    ] {
        let output = dir.run(&[command, more].concat());
        assert_eq!(output.status.code(), Some(1), "{command:?}: {}", stderr(&output));
        said = stderr(&output);
        assert!(said.contains(url), "{command:?}: {said}");
    }
    said
}

#[test]
fn every_byte_comes_over_tls_whatever_goes_wrong() {
    let (mut dir, authority) = world();
    let server = Server::secure(&authority.vouch_for(HERE));
    let url = put(&server, &dir);
    assert!(url.starts_with("https://"));
    unpacked(&dir, &[&url, "--ca-file", "ca"]);
    // Opening it takes two requests.
    let before = server.requests().len() as u64;
    server.script(move |request| match (request.number - before) % 7 {
        _ if request.number < before + 2 => None,
        2 => Some(Fault::Reset(5000)),
        3 => Some(Fault::Cut(9000)),
        5 => Some(Fault::Close),
        6 => Some(Fault::Status(503, None)),
        _ => None,
    });
    unpacked(&dir, &[&url, "--ca-file", "ca"]);
    assert!(server.requests().len() as u64 > before + 10);
    server.script(|_| None);
    // Whom the environment says to trust is trusted as well.
    dir.env.push(("SSL_CERT_FILE", "ca".into()));
    unpacked(&dir, &[&url]);
}

/// The URL of a server that takes what it is sent for HTTP, and says that it is none.
fn speaks_no_tls() -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("https://{}/image", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            // Until it hangs up: a reset could overtake the answer.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    });
    url
}

#[test]
fn servers_that_nobody_vouches_for_are_refused_with_a_remedy() {
    let (dir, authority) = world();
    let server = Server::secure(&authority.vouch_for(HERE));
    let url = put(&server, &dir);
    let said = refusal(&dir, &url, &[]);
    assert!(said.contains("nobody who is trusted") && said.contains("--ca-file"), "{said}");
    fs::write(dir.path("other"), Authority::new().pem()).unwrap();
    let said = refusal(&dir, &url, &["--ca-file", "other"]);
    assert!(said.contains("nobody who is trusted"), "{said}");
    assert!(server.requests().is_empty(), "something was asked of it");

    for (identity, says) in [
        (authority.vouch_for("elsewhere"), "not valid for name"),
        (authority.vouched_for(HERE), "expired"),
    ] {
        let server = Server::secure(&identity);
        let said = refusal(&dir, &put(&server, &dir), &["--ca-file", "ca"]);
        assert!(said.contains("certificate is not good") && said.contains(says), "{said}");
        assert!(server.requests().is_empty(), "something was asked of it");
    }

    let url = speaks_no_tls();
    let said = refusal(&dir, &url, &["--ca-file", "ca"]);
    assert!(said.contains("it is no TLS"), "{said}");

    fs::write(dir.path("empty"), "").unwrap();
    for file in ["empty", "nowhere"] {
        let said = refusal(&dir, &url, &["--ca-file", file]);
        assert!(said.contains(&format!("reading {file}")) && said.contains("PEM"), "{said}");
    }
}

#[test]
fn redirects_lead_to_tls_and_not_away_from_it() {
    let (dir, authority) = world();
    let secure = Server::secure(&authority.vouch_for(HERE));
    let plain = Server::new();
    let (from, to) = (put(&plain, &dir), put(&secure, &dir));
    let moved = |to: &str| Fault::Status(302, Some(("Location", to.to_owned())));
    let there = moved(&to);
    plain.script(move |_| Some(there.clone()));
    unpacked(&dir, &[&from, "--ca-file", "ca"]);
    let back = moved(&from);
    plain.script(|_| None);
    secure.script(move |_| Some(back.clone()));
    let asked = plain.requests().len();
    let said = refusal(&dir, &to, &["--ca-file", "ca"]);
    assert!(said.contains("redirects to where this program does not go"), "{said}");
    assert_eq!(plain.requests().len(), asked, "it went where others can write");
}

#[test]
fn nginx_serves_images_over_tls_to_a_confined_daemon() {
    let (dir, authority) = world();
    let Some(nginx) = Nginx::start(&dir, Some(&authority.vouch_for(HERE))) else {
        vmpager_testing::skipped("no nginx (Debian: nginx-light)");
        return;
    };
    let url = format!("https://{HERE}:{}/image", nginx.port);
    unpacked(&dir, &[&url, "--ca-file", "ca"]);
    let seen = dir.session(&url, &["--ca-file", "ca", "--cache", "cache"]);
    assert!(seen["frames_fetched"].as_u64().unwrap() > 50, "{seen}");
    let said = refusal(&dir, &url, &[]);
    assert!(said.contains("nobody who is trusted"), "{said}");
}
