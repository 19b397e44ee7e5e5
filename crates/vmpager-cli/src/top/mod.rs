//! `vmpager top`: a daemon's sessions, as they go on.

mod draw;
mod model;
mod screen;

use std::io::{IsTerminal, stdin, stdout};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::bail;
use vmpager::metrics::Endpoint;

use self::model::Model;
use crate::output;

/// Options of `vmpager top`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem \\\n      \
    --metrics unix:/run/vm/pager.sock.metrics &\n  \
    vmpager top --socket /run/vm/pager.sock\n\n\
    vmpager top --metrics 127.0.0.1:9464\n  \
    vmpager top --metrics 127.0.0.1:9464 --json | jq '.sessions[] | .faults_per_s'\n\n\
    Faults, their 99th percentile and bytes installed are those of the last interval.\n\
    A worker process that takes over counts anew: then they show a dash for a while.\n\n\
    Keys: up and down select a session, Enter shows more of it, s sorts by the next\n\
    column, r the other way round, q quits.")]
#[command(group = clap::ArgGroup::new("daemon").required(true))]
pub(crate) struct TopArgs {
    /// The socket of a daemon that was started with `--metrics unix:SOCKET.metrics`.
    #[arg(long, value_name = "SOCKET", group = "daemon")]
    socket: Option<PathBuf>,
    /// Where a daemon shows its numbers: what `vmpager serve --metrics` was given.
    #[arg(long, value_name = "ENDPOINT", group = "daemon")]
    metrics: Option<Endpoint>,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Print one table, of one interval, and end.
    #[arg(long)]
    once: bool,
    /// Print one JSON object instead, of one interval, and end.
    #[arg(long, conflicts_with = "once")]
    json: bool,
}

/// How long a daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

impl TopArgs {
    fn endpoint(&self) -> Endpoint {
        let socket = self.socket.clone().unwrap_or_default();
        self.metrics.clone().unwrap_or_else(|| {
            let mut path = socket.into_os_string();
            path.push(".metrics");
            Endpoint::Unix(path.into())
        })
    }
}

pub(crate) fn run(args: &TopArgs) -> anyhow::Result<()> {
    let endpoint = args.endpoint();
    let interval = Duration::from_secs(args.interval);
    if !args.once && !args.json {
        if !(stdin().is_terminal() && stdout().is_terminal()) {
            bail!(
                "vmpager top draws on a terminal, and standard input or output is none; use \
                 --once for a table, --json for an object"
            )
        }
        return screen::run(endpoint, interval);
    }
    let mut model = Model::default();
    for look in 0..2 {
        if look > 0 {
            std::thread::sleep(interval);
        }
        model.saw(endpoint.sessions(PATIENCE)?, Instant::now());
    }
    if args.json {
        output::json(&model.report())
    } else {
        output::write(draw::text(&model).as_bytes())
    }
}
