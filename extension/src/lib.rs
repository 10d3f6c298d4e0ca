//! stillebot: a PostgreSQL database that can be taken down, truly and lastingly read-only, and up again; and that tells of every
//! conflict and error of logical replication in a table.
//!
//! `_PG_init` below is the table of contents. SQL objects are declared by hand in `sql/`; each C function there is a
//! `#[pg_extern(sql = false)]` of verbs.rs, window.rs, node.rs, conflicts.rs or ddl.rs.

mod apply_log;
mod catalog;
mod collector;
mod compat;
mod conflicts;
mod ddl;
mod event;
mod guc;
mod identity;
mod local;
mod node;
mod pgoutput;
mod readonly;
mod ring;
mod shmem;
mod state;
mod subscription;
mod tap;
mod verbs;
mod window;

pgrx::pg_module_magic!();

/// Called by PostgreSQL when the library is loaded: once in the postmaster if it is preloaded, and inherited by all
/// backends; otherwise in any session that calls one of its functions, where it can only say what to set.
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    // SAFETY: a plain read of a value that the postmaster sets around preloading.
    if !unsafe { pgrx::pg_sys::process_shared_preload_libraries_in_progress } {
        return;
    }
    guc::init();
    shmem::init();
    readonly::init();
    window::init();
    local::init();
    ddl::init();
    tap::init();
    apply_log::init();
    collector::init();
}
