//! Waiting for a condition, never for a guess.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use tokio::time::{sleep, timeout};

/// How long a wait may take that is expected to end at once: long, because a loaded machine is not a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

const INTERVAL: Duration = Duration::from_millis(10);

/// Asks until the answer is `Ok(Some(value))`, and returns that value.
///
/// `Ok(None)` means not yet, and so does an error, because what is waited for is often a server that comes back; the
/// last error is part of the message when the deadline has passed. A single question may not outlast the deadline.
pub async fn wait_until<T, Check, Answer>(what: &str, deadline: Duration, mut check: Check) -> Result<T>
where
    Check: FnMut() -> Answer,
    Answer: Future<Output = Result<Option<T>>>,
{
    let started = Instant::now();
    loop {
        let left = deadline.saturating_sub(started.elapsed());
        let last_error = match timeout(left.max(INTERVAL), check()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => Some(anyhow!("the question was not answered")),
        };
        if started.elapsed() >= deadline {
            match last_error {
                None => bail!("waited {deadline:?} in vain for {what}"),
                Some(error) => bail!("waited {deadline:?} in vain for {what}; at last: {error:#}"),
            }
        }
        sleep(INTERVAL).await;
    }
}
