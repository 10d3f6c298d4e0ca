//! deinit
use super::{Context, Reply};
use crate::cli::Deinit;
use crate::failure::Failure;
/// x
pub async fn run(_c: &Context, _o: &Deinit) -> Result<Reply, Failure> {
    todo!()
}
