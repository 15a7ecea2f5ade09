//! Policies where the kernel lets no process make machine code, and where it lets it have few addresses.

use std::process::Command;

use peili_lab::Requirement::Policies as Components;
use peili_lab::skip_unless;
use serde_json::json;

use super::election::{plugin, view};
use super::request;
use crate::policy::election::ElectionPolicy;
use crate::policy::engine::Code;
use crate::policy::metrics::Metrics;
use crate::policy::registry::{RegistryPolicy, Ruling, Way};
use crate::policy::{Config, Node, Policies};

/// What `PR_SET_MDWE` is, and the number of `prctl`: no crate here knows them.
const REFUSE: &str = "syscall($^O eq 'linux' && `uname -m` =~ /x86_64/ ? 157 : 167, 65, 1, 0, 0, 0) == 0 or exit 77; \
                      exec { $ARGV[0] } @ARGV";
/// What the child's output has.
const SIGN: &str = "code is made as";

/// In a child of those below: what it finds out, and that policies of two worlds decide all the same.
#[test]
fn policies_decide_here() {
    skip_unless!("policy::tests::interpreted::policies_decide_here", Components);
    println!("{SIGN} {:?}", Code::here());
    let config = Config {
        registry: vec![plugin("allow-list", json!({"deny": ["docker.io/denied/*"]}))],
        election: vec![plugin("zone-spread", json!({}))],
        ..Config::default()
    };
    let policies = Policies::new(Node::default(), Metrics::default());
    policies.apply(&config).unwrap();
    assert!(matches!(policies.decide(&request("denied/app")).way, Way::Deny(_)));
    assert_eq!(policies.decide(&request("good/app")), Ruling::default());
    let ranked = policies.rank(&view(&["a1", "b1"]));
    assert_eq!(ranked.weights, Some(vec![1000, 1000]), "{ranked}");
    assert_eq!(policies.is_interpreted(), Code::here() == Code::Interpreted);
}

/// The tests of both worlds once more, in a process that may not make code.
#[test]
fn machine_code_is_done_without() {
    const NAME: &str = "policy::tests::interpreted::machine_code_is_done_without";
    skip_unless!(NAME, Components);
    let mut child = Command::new("perl");
    child.args(["-e", REFUSE]);
    match again(child) {
        Ok((Some(77), _)) => peili_lab::report_skip(NAME, "needs a kernel of 6.3 or newer"),
        Ok((code, text)) => {
            assert!(code == Some(0) && text.contains(&format!("{SIGN} Interpreted")), "{text}");
        }
        Err(_) => peili_lab::report_skip(NAME, "needs perl"),
    }
}

/// And in one that may have no more addresses than one memory would reserve.
#[test]
fn many_addresses_are_done_without() {
    const NAME: &str = "policy::tests::interpreted::many_addresses_are_done_without";
    skip_unless!(NAME, Components);
    let mut child = Command::new("prlimit");
    child.arg(format!("--as={}", 4_u64 << 30));
    let (code, text) = again(child).unwrap();
    assert!(code == Some(0) && text.contains(&format!("{SIGN} Checked")), "{text}");
}

/// Some tests of this binary in a child; how it ended, and what it wrote.
fn again(mut child: Command) -> std::io::Result<(Option<i32>, String)> {
    let tests = [
        "policy::tests::interpreted::policies_decide_here",
        "policy::tests::election::the_shipped_policies_rank_together",
        "policy::tests::engine::each_field_of_a_plan_arrives",
        "policy::tests::foreign::nothing_is_beyond_its_memory",
        "policy::tests::trust::node_allow_and_zone_boundary_decide_together",
    ];
    let child = child.arg(std::env::current_exe()?).args(tests);
    let output = child.args(["--exact", "--nocapture", "--test-threads=1"]).output()?;
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    let is_whole = !output.status.success() || text.contains("5 passed");
    assert!(is_whole, "{text}");
    Ok((output.status.code(), text))
}
