//! A server's clock, measured from here.

use std::time::{Duration, SystemTime};

use crate::node::{NodeError, Session};
use crate::sql;

/// How many round trips a clock is measured with; the fastest counts.
const ROUNDS: usize = 7;

/// A server's clock against this machine's, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clock {
    /// How far it is ahead.
    pub offset: f64,
    /// By how much that may be wrong, either way.
    pub uncertainty: f64,
}

impl Clock {
    /// Measures it: the round trip that took least time says most.
    pub async fn measure(session: &Session, bound: Duration) -> Result<Self, NodeError> {
        let mut best = Self { offset: 0.0, uncertainty: f64::INFINITY };
        for _ in 0..ROUNDS {
            let sent = now_us();
            let server: i64 = session.row(sql::CLOCK, &[], bound).await?.get("now_us");
            let received = now_us();
            let uncertainty = (received - sent).max(0.0) / 2.0;
            if uncertainty < best.uncertainty {
                best = Self { offset: server as f64 - (sent + received) / 2.0, uncertainty };
            }
        }
        Ok(best)
    }
}

fn now_us() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1e6)
}
