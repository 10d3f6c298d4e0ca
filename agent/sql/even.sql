-- Makes sessions on all nodes alike: rows are compared by how they are written, and what a down database tells its sessions
-- must not refuse the agent's own calls.
set default_transaction_read_only = off;
set timezone = 'UTC';
set datestyle = 'ISO';
set intervalstyle = 'postgres';
set bytea_output = 'hex';
set extra_float_digits = 1
