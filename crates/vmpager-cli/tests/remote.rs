//! Images at servers as their user meets them: `serve` and `image` with URLs, against
//! nginx where there is one, and a server that does what it is told to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod images;

use std::fs;
use std::time::Duration;

use images::{Dir, Nginx, put, remote, stderr, verified, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmpager_testing::http::{Fault, Server};

#[test]
fn a_restarted_daemon_fetches_nothing_that_is_in_its_cache() {
    let (dir, server) = (Dir::new(), Server::new());
    let url = put(&server, &dir);
    let cache = ["--cache", "cache", "--cache-size", "1G"];
    let first = dir.session(&url, &cache);
    let count = |numbers: &Value, what: &str| numbers[what].as_u64().unwrap();
    assert!(count(&first, "frames_fetched") > 50, "{first}");
    let second = dir.session(&url, &cache);
    assert!(count(&second, "frames_cached") > 50, "{second}");
    // The daemon may have ended before the last of it was written.
    let not_kept = count(&first, "frames_fetched") - count(&first, "frames_stored");
    assert!(count(&second, "frames_fetched") <= not_kept, "{first}, then {second}");
}

#[test]
fn a_worker_that_is_killed_is_replaced_while_its_server_fails() {
    let (dir, server) = (Dir::new(), Server::new());
    let url = put(&server, &dir);
    server.latency(Duration::from_millis(5));
    let pager = dir.serve(&url, &["--prefetch", "off"]);
    let guest = dir.guest("3000");
    let keeper = pager.id();
    let worker = || {
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"));
        children.unwrap().split_whitespace().next().and_then(|pid| pid.parse::<i32>().ok())
    };
    for round in 0..3 {
        let asked = server.requests().len();
        // Opening it takes two; then it is serving.
        wait_for("a fault", || server.requests().len() > asked + 4);
        let killed = worker().unwrap();
        kill_process(Pid::from_raw(killed).unwrap(), Signal::KILL).unwrap();
        server.script(move |request| (request.number % 7 == round).then_some(Fault::Close));
        wait_for("another worker", || worker().is_some_and(|pid| pid != killed));
    }
    verified(guest, "3000");
    kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
    assert!(remote(pager)["frames_fetched"].as_u64().unwrap() > 0);
}

#[test]
fn servers_that_cannot_serve_images_are_refused_with_a_remedy() {
    let (dir, server) = (Dir::new(), Server::new());
    let url = put(&server, &dir);
    for (fault, says) in [
        (Fault::IgnoreRange, "ignores ranges"),
        (Fault::Status(403, None), "signed"),
        (Fault::Status(404, None), "no such object"),
    ] {
        server.script(move |_| Some(fault.clone()));
        for command in [
            &["image", "inspect", &url][..],
            &["image", "verify", &url],
            &["image", "unpack", &url, "out"],
            &["serve", "--socket", "sock", "--image", &url],
        ] {
            let output = dir.run(command);
            assert_eq!(output.status.code(), Some(1), "{command:?}");
            assert!(stderr(&output).contains(says), "{command:?}: {}", stderr(&output));
        }
    }
    let usage = dir.run(&["serve", "--socket", "s", "--image", &url, "--cache-size", "1G"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn nginx_serves_images_to_every_command() {
    let dir = Dir::new();
    let Some(nginx) = Nginx::start(&dir, None) else {
        vmpager_testing::skipped("no nginx (Debian: nginx-light)");
        return;
    };
    let url = format!("http://127.0.0.1:{}/image", nginx.port);
    let inspected: Value =
        serde_json::from_slice(&dir.done(&["image", "inspect", &url, "--json"]).stdout).unwrap();
    assert_eq!(inspected["memory_bytes"], 16 << 20, "{inspected}");
    dir.done(&["image", "verify", &url]);
    dir.done(&["image", "unpack", &url, "out"]);
    assert!(fs::read(dir.path("out")).unwrap() == fs::read(dir.mem()).unwrap());
    let seen = dir.session(&url, &[]);
    assert!(seen["frames_fetched"].as_u64().unwrap() > 50, "{seen}");
    let access = fs::read_to_string(dir.path("nginx/access")).unwrap();
    assert!(access.lines().all(|line| line.contains("\" 206 ")), "{access}");

    // The image is replaced by another one: what was there is not made up.
    let pager = dir.serve(&url, &["--prefetch", "off"]);
    fs::write(dir.path("new"), vec![7; 1 << 20]).unwrap();
    fs::rename(dir.path("new"), dir.path("image")).unwrap();
    let output = dir.guest("2000").wait_with_output().unwrap();
    assert!(!output.status.success(), "a guest without its memory went on");
    kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
    let log = stderr(&pager.wait_with_output().unwrap());
    assert!(log.contains("modified while being served"), "{log}");
}
