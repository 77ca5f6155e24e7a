"""What notebooks show: building blocks of HTML (`html`) and of pictures and sounds (`media`)."""
