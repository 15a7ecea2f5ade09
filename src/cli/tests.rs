//! The help of every command, and what arguments may be.

use clap::CommandFactory;

use super::*;

fn walk(command: &mut clap::Command, path: &str) {
    let name = format!("{path} {}", command.get_name());
    let help = command.render_long_help().to_string();
    assert!(help.len() > 100 && command.get_about().is_some(), "{name} has no help");
    for argument in command.get_arguments() {
        assert!(argument.get_help().is_some(), "{name}: {} has no help", argument.get_id());
    }
    if command.get_subcommands().next().is_none() {
        assert!(help.contains("Examples:") && help.contains("Exit codes:"), "{name} has no examples");
    }
    for inner in command.get_subcommands_mut().filter(|inner| inner.get_name() != "help") {
        walk(inner, &name);
    }
}

#[test]
fn every_command_has_help() {
    let mut command = Cli::command();
    command.clone().debug_assert();
    command.build();
    walk(&mut command, "");
}

/// The watchdog's exit code is what a supervisor sees.
#[test]
fn run_names_all_its_exit_codes() {
    let mut command = Cli::command();
    let help = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
    for code in [0, 1, 2, crate::watchdog::EXIT_CODE] {
        assert!(help.split_whitespace().any(|word| word == code.to_string()), "{code}: {help}");
    }
}

#[test]
fn arguments_are_checked() {
    let check = |line: &str, valid: bool| {
        let result = Cli::try_parse_from(line.split(' '));
        assert_eq!(result.is_ok(), valid, "{line}: {result:?}");
    };
    check("peili run --config a.yaml --set a.b=1 --set c.d=2", true);
    check("peili pull nginx --to layout:/tmp/x", true);
    check("peili pull nginx --to /tmp/x", false);
    check("peili pull nginx", false);
    check("peili pull nginx --to layout:/tmp/x --host http://a/v2 --hosts-dir /x", false);
    check("peili pull nginx --to layout:/tmp/x --host http://a/v2", true);
    check("peili pull nginx --to layout:/tmp/x --host https://user:secret@a/v2", false);
    check("peili pull nginx --to layout:/tmp/x --host ftp://a/v2", false);
    check("peili pull nginx --to layout:/tmp/x --host a/v2", false);
    check("peili pull NGINX --to layout:/tmp/x", false);
    check("peili config check", true);
    check("peili config", false);
}

#[tokio::test]
async fn wrong_configuration_is_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.yaml");
    std::fs::write(&path, "mirror: {segmnt: 1}").unwrap();
    let cli = Cli::try_parse_from(["peili", "config", "check", "--config", path.to_str().unwrap()]).unwrap();
    assert_eq!(cli.execute().await.unwrap_err().code(), 2);
    std::fs::write(&path, "").unwrap();
    let cli = Cli::try_parse_from(["peili", "config", "check", "--config", path.to_str().unwrap()]).unwrap();
    assert!(cli.execute().await.is_ok());
}

#[tokio::test]
async fn man_pages_of_all_commands() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man1");
    let cli = Cli::try_parse_from(["peili", "man", "--dir", folder.to_str().unwrap()]).unwrap();
    cli.execute().await.unwrap();
    for page in ["peili.1", "peili-pull.1", "peili-config-check.1"] {
        assert!(folder.join(page).exists(), "{page}");
    }
}
