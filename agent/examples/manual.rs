//! Writes the agent's man pages and shell completions, which its command line alone determines, into a directory:
//!
//! ```text
//! man1/stillebot-agent.1, man1/stillebot-agent-hop.1 and so on
//! bash/stillebot-agent      zsh/_stillebot-agent      fish/stillebot-agent.fish
//! ```
//!
//! An example and not a program, so that what generates them is no part of what is installed.

use std::fs;
use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;
use stillebot_agent::cli::Cli;

fn main() -> std::io::Result<()> {
    let Some(root) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: manual DIRECTORY");
        std::process::exit(2);
    };
    let directory = |name: &str| {
        let path = root.join(name);
        fs::create_dir_all(&path).map(|()| path)
    };
    let mut command = Cli::command();
    clap_mangen::generate_to(command.clone(), directory("man1")?)?;
    let name = command.get_name().to_owned();
    for (folder, shell, file) in [
        ("bash", Shell::Bash, name.clone()),
        ("zsh", Shell::Zsh, format!("_{name}")),
        ("fish", Shell::Fish, format!("{name}.fish")),
    ] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, &name, &mut script);
        fs::write(directory(folder)?.join(file), script)?;
    }
    Ok(())
}
