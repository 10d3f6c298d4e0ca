//! The recorded state and identity in pg_db_role_setting: read from hooks, written by the verbs.

use std::ffi::{CStr, c_char, c_int};
use std::ptr::null_mut;

use pgrx::pg_sys;

use crate::compat::{self, DB_ROLE_SETTING, DB_ROLE_SETTING_PKEY, c_string};

pub const STATE: &CStr = c"stillebot.state";
pub const IDENTITY: &CStr = c"stillebot.identity";
pub const READ_ONLY: &CStr = c"default_transaction_read_only";

/// The value that is attached to a database for a setting, as committed by now; null if none.
///
/// Plain C in Rust's clothes, for hooks call it: it may raise (and then passes over this frame, which holds nothing to
/// drop), and what it returns is palloc'd.
///
/// # Safety
/// A transaction is in progress.
pub unsafe fn recorded(database: pg_sys::Oid, setting: &CStr) -> *const c_char {
    // SAFETY: the classic catalog scan; the caller has a transaction, relation and scan are closed before we return.
    unsafe {
        let relation = compat::table_open(DB_ROLE_SETTING, pg_sys::AccessShareLock as c_int);
        let mut keys: [pg_sys::ScanKeyData; 2] = std::mem::zeroed();
        for (index, (key, value)) in keys.iter_mut().zip([database, pg_sys::InvalidOid]).enumerate() {
            let strategy = pg_sys::BTEqualStrategyNumber as u16;
            compat::ScanKeyInit(key, index as i16 + 1, strategy, pg_sys::F_OIDEQ.into(), value.into());
        }
        let scan =
            compat::systable_beginscan(relation, DB_ROLE_SETTING_PKEY, true, null_mut(), 2, (&raw mut keys).cast());
        let tuple = compat::systable_getnext(scan);
        let mut found = std::ptr::null();
        if !tuple.is_null() {
            let mut values = [pg_sys::Datum::from(0); 3];
            let mut nulls = [true; 3];
            compat::heap_deform_tuple(tuple, (*relation).rd_att, (&raw mut values).cast(), (&raw mut nulls).cast());
            if !nulls[2] {
                found = value_in(values[2], setting);
            }
        }
        compat::systable_endscan(scan);
        compat::table_close(relation, pg_sys::AccessShareLock as c_int);
        found
    }
}

/// Looks for `name=value` in a text[] of settings.
///
/// # Safety
/// `settings` is a text[] datum.
unsafe fn value_in(settings: pg_sys::Datum, setting: &CStr) -> *const c_char {
    // SAFETY: the caller vouches for the type; the arrays are as long as `count` says.
    unsafe {
        let array = compat::pg_detoast_datum(settings.cast_mut_ptr()).cast();
        let (mut elements, mut nulls, mut count) = (null_mut(), null_mut(), 0);
        compat::deconstruct_array_builtin(array, pg_sys::TEXTOID, &mut elements, &mut nulls, &mut count);
        for index in 0..count as usize {
            if *nulls.add(index) {
                continue;
            }
            let entry = compat::text_to_cstring((*elements.add(index)).cast_mut_ptr());
            let bytes = CStr::from_ptr(entry).to_bytes();
            let name = setting.to_bytes();
            if bytes.starts_with(name) && bytes.get(name.len()) == Some(&b'=') {
                return entry.add(name.len() + 1);
            }
        }
        std::ptr::null()
    }
}

/// Attaches a setting to this database, or removes it. For the SQL functions only: may raise.
pub fn record(setting: &CStr, value: Option<&str>) {
    let setting = setting.to_str().expect("names of settings are ASCII");
    let change = match value {
        // SAFETY: copies a C string into a palloc'd literal.
        Some(value) => unsafe {
            let literal = pg_sys::quote_literal_cstr(c_string(value).as_ptr());
            format!("set {setting} = {}", CStr::from_ptr(literal).to_string_lossy())
        },
        None => format!("reset {setting}"),
    };
    // The name of the database is not looked up: the statement is only a way to build the parse tree of the change.
    let statement = parse(&format!("alter database this {change}"));
    // SAFETY: the parser made it of ALTER DATABASE .. SET; the caller is a guarded function.
    unsafe {
        let statement = statement.cast::<pg_sys::AlterDatabaseSetStmt>();
        compat::alter_setting(pg_sys::MyDatabaseId, (*statement).setstmt);
        pg_sys::CommandCounterIncrement(); // The next change is to the same row.
    }
}

/// The parse tree of a single statement that this extension wrote itself.
pub fn parse(statement: &str) -> *mut pg_sys::Node {
    let statement = c_string(statement);
    // SAFETY: a list of exactly one RawStmt, for there is one statement.
    unsafe {
        let list = pg_sys::raw_parser(statement.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        let raw = (*(*list).elements).ptr_value.cast::<pg_sys::RawStmt>();
        (*raw).stmt
    }
}

/// What is looked at of a subscription of this database.
pub struct Subscription {
    pub enabled: bool,
    pub conninfo: *const c_char,
    /// As workers connect: core's own rule.
    pub must_use_password: bool,
    /// What came to the publisher from elsewhere comes along.
    pub any_origin: bool,
}

/// A subscription of this database, as seen by this transaction. As [`recorded`].
///
/// # Safety
/// A transaction is in progress; `name` is a C string.
pub unsafe fn subscription(name: *const c_char) -> Option<Subscription> {
    const CACHE: c_int = pg_sys::SysCacheIdentifier::SUBSCRIPTIONNAME as c_int;
    // SAFETY: the name is of the key's type; strings are copied before the row is let go of. Columns have other numbers in
    // other versions.
    unsafe {
        let row = compat::SearchSysCache2(CACHE, pg_sys::MyDatabaseId.into(), name.into());
        if row.is_null() {
            return None;
        }
        let value = |column: &CStr| {
            let mut is_null = false;
            let number = compat::get_attnum(compat::SUBSCRIPTION, column.as_ptr());
            let value = compat::SysCacheGetAttr(CACHE, row, number, &mut is_null);
            if is_null { pg_sys::Datum::from(0) } else { value }
        };
        let text = |column: &CStr| -> *const c_char { compat::text_to_cstring(value(column).cast_mut_ptr()) };
        let owner = pg_sys::Oid::from(value(c"subowner").value() as u32);
        let found = Subscription {
            enabled: value(c"subenabled").value() != 0,
            conninfo: text(c"subconninfo"),
            must_use_password: value(c"subpasswordrequired").value() != 0 && !compat::superuser_arg(owner),
            any_origin: CStr::from_ptr(text(c"suborigin")).to_bytes().eq_ignore_ascii_case(b"any"),
        };
        compat::ReleaseSysCache(row);
        Some(found)
    }
}

/// Whether this database has a subscription besides that one. As [`recorded`].
///
/// # Safety
/// A transaction is in progress; `name` is a C string.
pub unsafe fn has_other_subscription(name: *const c_char) -> bool {
    // SAFETY: as in recorded(); the row is looked at while the scan is open, and the first columns of a subscription have
    // been the same in all versions.
    unsafe {
        let relation = compat::table_open(compat::SUBSCRIPTION, pg_sys::AccessShareLock as c_int);
        let scan = compat::systable_beginscan(relation, pg_sys::InvalidOid, false, null_mut(), 0, null_mut());
        let mut found = false;
        while !found {
            let tuple = compat::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let mut values = [pg_sys::Datum::from(0); 32];
            let mut nulls = [true; 32];
            compat::heap_deform_tuple(tuple, (*relation).rd_att, (&raw mut values).cast(), (&raw mut nulls).cast());
            // oid, subdbid, subskiplsn, subname
            found = values[1].value() as u32 == pg_sys::MyDatabaseId.to_u32()
                && CStr::from_ptr(values[3].cast_mut_ptr::<c_char>()) != CStr::from_ptr(name);
        }
        compat::systable_endscan(scan);
        compat::table_close(relation, pg_sys::AccessShareLock as c_int);
        found
    }
}
