//! set_connection
use super::{Context, Reply};
use crate::cli::SetConnection;
use crate::failure::Failure;
/// x
pub async fn run(_c: &Context, _o: &SetConnection) -> Result<Reply, Failure> {
    todo!()
}
