//! The report for people.

use std::fmt::Write as _;

use super::{Report, Verdict};

/// Characters of a line.
const LINE: usize = 1_000;

pub(super) fn render(report: &Report) -> String {
    let mut text = String::new();
    for verdict in &report.verdicts {
        one(&mut text, verdict);
        text.push('\n');
    }
    for line in &report.seen {
        let _ = writeln!(text, "{}", plain(line));
    }
    let place = &report.place;
    let place =
        format!("{:?}, network {:?}, cni {:?}", place.inside, place.network, place.cni).to_lowercase();
    let _ = writeln!(text, "place: {place}, distribution {}", report.place.distribution);
    let count = report.verdicts.len();
    let _ = match count {
        0 => writeln!(text, "nothing is wrong (looked for {} ms)", report.millis),
        1 => writeln!(text, "1 verdict (looked for {} ms)", report.millis),
        _ => writeln!(text, "{count} verdicts (looked for {} ms)", report.millis),
    };
    text
}

fn one(text: &mut String, verdict: &Verdict) {
    let Verdict { code, severity, confidence, evidence, other_causes, fix, manifests, .. } = verdict;
    let _ = writeln!(text, "{} {}: {}", severity.name(), code.name(), verdict.text);
    let _ = writeln!(text, "  confidence: {}", confidence.name());
    for line in evidence {
        let _ = writeln!(text, "  seen: {}", plain(line));
    }
    for line in other_causes {
        let _ = writeln!(text, "  could be: {}", plain(line));
    }
    let lines: Vec<String> = fix.trim_end().lines().map(plain).collect();
    let _ = writeln!(text, "  fix: {}", lines.join("\n    "));
    for manifest in manifests {
        let _ = writeln!(text, "  apply {} ({}):", manifest.file, manifest.contents());
        for line in manifest.text().lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
}

/// One line of a bounded length, whatever others have written into it.
fn plain(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).take(LINE).collect()
}

#[cfg(test)]
mod tests {
    use super::super::code::{Code, Confidence};
    use super::super::place::Place;
    use super::*;

    #[test]
    fn a_report_is_read_from_the_top() {
        let verdict = Verdict::new(Code::NoToken, Confidence::High, "first\nsecond");
        let verdict = verdict.seen("a\u{1b}[31m\nb").or("c").or("d").or("e");
        let report = |verdicts| Report {
            version: 1,
            place: Place::default(),
            verdicts,
            seen: vec!["f: g".into()],
            millis: 3,
            asked: true,
        };
        let text = report(vec![verdict]).render();
        assert_eq!(
            text,
            "problem no-token: no token of a service account is mounted, or it cannot be read\n  confidence: high\n  \
             seen: a [31m b\n  could be: c\n  could be: d\n  fix: first\n    second\n\nf: g\n\
             place: node, network unknown, cni unknown, distribution \n1 verdict (looked for 3 ms)\n"
        );
        assert!(report(Vec::new()).render().ends_with("nothing is wrong (looked for 3 ms)\n"));
    }
}
