//! The connection to a pager beside this process that was handed a VM's memory.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmpager::refusal;

/// What to do once the pager says that it will not serve the memory it was handed.
/// Nobody will then: whoever touches what is absent waits until the process ends. By
/// default nothing is done.
#[derive(Clone, Default)]
pub struct OnRefusal(Option<Arc<Hook>>);

type Hook = dyn Fn(&str) + Send + Sync;

impl OnRefusal {
    /// Calls `hook` with the pager's reason, from a thread of its own, when it refuses.
    pub fn call(hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }
}

impl fmt::Debug for OnRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OnRefusal({})", if self.0.is_some() { "a hook" } else { "nothing" })
    }
}

/// The connection, whose end the pager takes for the end of the VM.
#[derive(Debug)]
pub(crate) struct Connection(UnixStream);

impl Connection {
    /// Listens to what the pager says, if somebody wants to know.
    pub(crate) fn new(stream: UnixStream, refused: &OnRefusal) -> io::Result<Self> {
        if let Some(hook) = refused.0.clone() {
            let from = stream.try_clone()?;
            std::thread::Builder::new().name("pager-refusal".into()).spawn(move || {
                // An end that gives no reason is a pager's that is done, or has died.
                if let Ok(Some(why)) = refusal::wait(from) {
                    hook(&why);
                }
            })?;
        }
        Ok(Self(stream))
    }
}

impl Drop for Connection {
    /// The thread that listens has it, too.
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
