-- Whose sessions may write, and for how many seconds. The window is held by this session.
select multihome.open_window($1::text::name, $2::float8 * interval '1 second')
